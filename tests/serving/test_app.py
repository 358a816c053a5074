"""Rankings and explanations over HTTP: by a ranker that answers at once, and by the real one."""

import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from feature_repo.errors import StoreError
from serving import schemas
from serving.answers import AddedBehavior, HistoryChanges
from serving.app import create_app
from serving.deployment import Deployment
from tests.serving.conftest import ITEMS, World
from tests.serving.stand_in import StandIn, client_of, stand_in_app, strict, toy_directory


@pytest.fixture
def ranker() -> StandIn:
    return StandIn()


@pytest.fixture
def client(ranker: StandIn) -> Iterator[TestClient]:
    with client_of(stand_in_app(ranker)) as client:
        yield client


VISIT = {"X-Request-ID": "visit-7"}
RANKED_ANN = {
    "user_id": "ann",
    "known": True,
    "model": "toy-run",
    "at": "2024-06-01T12:00:00Z",
    "path": "cached",
    "ranked": [{"item_id": "L1", "text": "red lamp", "score": 0.9, "reason": "popular now"}],
    "unknown_items": [],
    "notes": [],
    "degraded": [],
}


# Rankings.
def test_rank(client: TestClient) -> None:
    response = client.post("/v1/rank", json={"user_id": "ann", "top_k": 1}, headers=VISIT)
    assert response.status_code == 200
    assert strict(response.text) == {"request_id": "visit-7", **RANKED_ANN}


def test_an_answer_says_its_request_id_also_where_the_caller_names_none(client: TestClient) -> None:
    response = client.post("/v1/rank", json={"user_id": "ann"})
    assert response.json()["request_id"] == response.headers["x-request-id"] != ""


def test_rank_takes_ten_by_default_and_a_thousand_at_most(client: TestClient) -> None:
    candidates = [f"i{number}" for number in range(999)] + ["L1"]
    body = {"user_id": "ann", "candidates": candidates, "top_k": 1000}
    answer = client.post("/v1/rank", json=body).json()
    assert answer["unknown_items"] == candidates[:-1]
    assert [item["item_id"] for item in answer["ranked"]] == ["L1"]
    assert schemas.RankRequest.model_validate({"user_id": "ann"}).top_k == 10


def test_an_unknown_user_gets_an_answer_that_says_why_it_is_worse(client: TestClient) -> None:
    answer = client.post("/v1/rank", json={"user_id": "nobody"}).json()
    assert answer["known"] is False
    assert answer["path"] == "live"
    assert answer["degraded"] == ["store away: nothing was read"]
    assert len(answer["ranked"]) == len(ITEMS)


def test_a_ranking_can_be_explained(client: TestClient) -> None:
    body = {"user_id": "ann", "top_k": 2, "explain": True}
    first, second = client.post("/v1/rank", json=body).json()["ranked"]
    assert len(first["contributions"]) == len(second["contributions"]) == 5
    assert first["contributions"][1] == {
        "text": "red lamp",
        "scene": "purchase",
        "time": "2024-05-20T12:00:00Z",
        "count": 2,
        "logits": 0.5,
    }
    too_many = client.post("/v1/rank", json=body | {"top_k": 51})
    assert too_many.status_code == 422
    assert too_many.json()["detail"][0]["loc"] == ["body", "top_k"]
    assert "at most 50" in too_many.json()["detail"][0]["msg"]


def test_changes_and_context_reach_the_ranker(client: TestClient, ranker: StandIn) -> None:
    added = [{"scene": "search", "text": "boats"}, {"scene": "purchase", "item_id": "B1"}]
    body = {
        "user_id": "ann",
        "context": {"slot": 2},
        "changes": {"removed": [1, 0], "added": added},
    }
    assert client.post("/v1/rank", json=body).status_code == 200
    expected = HistoryChanges(
        removed=(1, 0),
        added=(AddedBehavior("search", text="boats"), AddedBehavior("purchase", item_id="B1")),
    )
    assert ranker.asked == [{"at": None, "context": {"slot": 2}, "changes": expected}]


def test_a_batch_is_answered_in_its_order(client: TestClient, ranker: StandIn) -> None:
    requests = [{"user_id": "ann", "top_k": 1}, {"user_id": "nobody", "top_k": 1}]
    answer = client.post("/v1/rank:batch", json={"requests": requests}, headers=VISIT)
    assert answer.status_code == 200
    first, second = strict(answer.text)["results"]
    assert first == {"request_id": "visit-7/0", **RANKED_ANN}
    assert (second["request_id"], second["user_id"]) == ("visit-7/1", "nobody")

    errors: list[Exception | None] = [StoreError("the store is away: start it"), None]

    def fail_once() -> None:
        if error := errors.pop(0):
            raise error

    ranker.before = fail_once
    answer = client.post("/v1/rank:batch", json={"requests": requests[::-1]}, headers=VISIT)
    assert answer.status_code == 200
    assert answer.json()["results"] == [
        {"error": "the store is away: start it"},
        {"request_id": "visit-7/1", **RANKED_ANN},
    ]


def test_a_batch_with_a_malformed_request_names_it(client: TestClient) -> None:
    requests = [{"user_id": "ann"}, {"user_id": "bob", "context": {"hour": 1}}]
    response = client.post("/v1/rank:batch", json={"requests": requests})
    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"] == ["body", "requests", 1, "context", "hour"]
    for number in (0, 65):
        body = {"requests": [{"user_id": "ann"}] * number}
        assert client.post("/v1/rank:batch", json=body).status_code == 422


def test_explain(client: TestClient) -> None:
    response = client.post("/v1/explain", json={"user_id": "ann", "item_id": "L1"})
    answer = strict(response.text)
    assert len(answer.pop("contributions")) == 7
    assert answer == {
        "user_id": "ann",
        "item_id": "L1",
        "text": "red lamp",
        "model": "toy-run",
        "at": "2024-06-01T12:00:00Z",
        "score": 0.5,
        "score_without_history": 0.25,
        "reason": "popular now",
    }
    unknown = client.post("/v1/explain", json={"user_id": "ann", "item_id": "secret"})
    assert unknown.status_code == 404
    assert unknown.json() == {"detail": "the feature store does not know this item"}


# Malformed requests.
LONG = "x" * 257
ADDED = {"scene": "search", "text": "boats"}


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({}, ["body", "user_id"]),
        ({"user_id": None}, ["body", "user_id"]),
        ({"user_id": 17}, ["body", "user_id"]),
        ({"user_id": ""}, ["body", "user_id"]),
        ({"user_id": LONG}, ["body", "user_id"]),
        ({"user_id": "a\nb"}, ["body", "user_id"]),
        ({"user_id": "a\x85b"}, ["body", "user_id"]),
        ({"user_id": "a", "top_k": 0}, ["body", "top_k"]),
        ({"user_id": "a", "top_k": 1001}, ["body", "top_k"]),
        ({"user_id": "a", "top_k": 2.5}, ["body", "top_k"]),
        ({"user_id": "a", "top_k": "5"}, ["body", "top_k"]),
        ({"user_id": "a", "top_k": True}, ["body", "top_k"]),
        ({"user_id": "a", "explain": 1}, ["body", "explain"]),
        ({"user_id": "a", "candidates": []}, ["body", "candidates"]),
        ({"user_id": "a", "candidates": "L1"}, ["body", "candidates"]),
        ({"user_id": "a", "candidates": ["i"] * 1001}, ["body", "candidates"]),
        ({"user_id": "a", "candidates": ["L1", 3]}, ["body", "candidates", 1]),
        ({"user_id": "a", "candidates": ["L1", LONG]}, ["body", "candidates", 1]),
        ({"user_id": "a", "context": [1]}, ["body", "context"]),
        ({"user_id": "a", "context": {"slot": "1"}}, ["body", "context", "slot"]),
        ({"user_id": "a", "context": {"slot": None}}, ["body", "context", "slot"]),
        ({"user_id": "a", "context": {"slot": 1e39}}, ["body", "context", "slot"]),
        ({"user_id": "a", "context": {"hour": 1.0}}, ["body", "context", "hour"]),
        ({"user_id": "a", "user": "b"}, ["body", "user"]),
        ({"user_id": "a", "changes": {"removed": [-1]}}, ["body", "changes", "removed", 0]),
        ({"user_id": "a", "changes": {"removed": [0.5]}}, ["body", "changes", "removed", 0]),
        ({"user_id": "a", "changes": {"remove": []}}, ["body", "changes", "remove"]),
        (
            {"user_id": "a", "changes": {"added": [ADDED, ADDED | {"scene": "dream"}]}},
            ["body", "changes", "added", 1, "scene"],
        ),
        (
            {"user_id": "a", "changes": {"added": [{"scene": "search"}]}},
            ["body", "changes", "added", 0],
        ),
        (
            {"user_id": "a", "changes": {"added": [ADDED | {"text": "x" * 1001}]}},
            ["body", "changes", "added", 0, "text"],
        ),
        ([], ["body"]),
        ("text", ["body"]),
    ],
)
def test_a_malformed_body_names_its_field(client: TestClient, body: Any, place: list[Any]) -> None:
    response = client.post("/v1/rank", json=body)
    assert response.status_code == 422
    assert place in [problem["loc"] for problem in strict(response.text)["detail"]]


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ('{"user_id": "a", "context": {"slot": NaN}}', ["body", "context", "slot"]),
        ('{"user_id": "a", "context": {"slot": -Infinity}}', ["body", "context", "slot"]),
        ('{"user_id": "a", "context": {"slot": 1e999}}', ["body", "context", "slot"]),
        ('{"user_id": "a", "top_k": NaN}', ["body", "top_k"]),
        ('{"user_id": NaN}', ["body", "user_id"]),
        ('{"user_id": "\\ud800"}', ["body", "user_id"]),
        ('{"user_id": "a", "\\ud800": 1}', ["body"]),
        ('{"user_id": "a", "context": {"\\ud800": 1}}', ["body", "context", "\\ud800"]),
        ('{"user_id": "a", ', ["body", 17]),
        ("", ["body"]),
    ],
)
def test_a_body_that_json_libraries_disagree_on(
    client: TestClient, body: str, place: list[Any]
) -> None:
    response = client.post("/v1/rank", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 422
    assert place in [problem["loc"] for problem in strict(response.text)["detail"]]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"user_id": "a\tb"}, "Control characters are not taken"),
        ({"user_id": "ann", "topk": 3}, "This field is unknown; there are user_id, candidates, to"),
        (
            {
                "user_id": "ann",
                "changes": {"added": [{"scene": "search", "text": "x", "id": "L1"}]},
            },
            "This field is unknown; there are scene, text, item_id",
        ),
    ],
)
def test_a_malformed_body_is_told_of_in_words(client: TestClient, body: Any, words: str) -> None:
    (problem,) = client.post("/v1/rank", json=body).json()["detail"]
    assert problem["msg"].startswith(words)


@pytest.mark.parametrize("body", [b"\xff\xfe\xfa", b'{"a": ' * 100_000, b'{"a": ' + b"1" * 5_000])
def test_a_body_that_is_no_json_at_all(client: TestClient, body: bytes) -> None:
    response = client.post("/v1/rank", content=body, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422)
    assert strict(response.text)["detail"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
def test_another_content_type_is_refused(client: TestClient, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    response = client.post("/v1/rank", content=b'{"user_id": "ann"}', headers=headers)
    assert response.status_code == 422
    sentence = "A JSON object is expected, with content type application/json"
    assert response.json()["detail"][0]["msg"] == sentence


def test_the_input_is_not_echoed(client: TestClient) -> None:
    response = client.post("/v1/rank", json={"user_id": "secret-" * 100})
    assert response.status_code == 422
    assert "secret" not in response.text


# The real ranker.
@pytest.fixture
def real(world: World) -> Iterator[TestClient]:
    app = create_app(Deployment(world.ranker()), directory=toy_directory())
    with client_of(app) as client:
        yield client


def test_a_real_ranking(real: TestClient, world: World) -> None:
    answer = strict(real.post("/v1/rank", json={"user_id": "ann", "top_k": 2}).text)
    expected = world.ranker().rank("ann", top_k=2)
    assert answer["ranked"] == [
        {"item_id": i.item_id, "text": i.text, "score": i.score, "reason": i.reason}
        for i in expected.ranked
    ]
    assert [item["item_id"] for item in answer["ranked"]] == ["L1", "L2"]


def test_a_real_ranking_of_candidates_with_context(real: TestClient) -> None:
    body = {"user_id": "ann", "candidates": ["B1", "zzz"], "context": {"slot": 2}}
    with_slot = real.post("/v1/rank", json=body).json()
    without = real.post("/v1/rank", json=body | {"context": {}}).json()
    assert with_slot["unknown_items"] == ["zzz"]
    assert with_slot["notes"] == ["1 unknown item left out"]
    (entry,), (plain,) = with_slot["ranked"], without["ranked"]
    logits = [math.log(e["score"] / (1 - e["score"])) for e in (entry, plain)]
    assert logits[0] - logits[1] == pytest.approx(2, abs=1e-4)


def test_a_real_history_that_might_have_been(real: TestClient) -> None:
    history = real.get("/v1/users/ann").json()["history"]
    assert [behavior["item_id"] for behavior in history] == ["L1", None, "L1"]
    body = {"user_id": "ann", "top_k": 1, "changes": {"removed": [0, 1, 2]}}
    forgotten = real.post("/v1/rank", json=body).json()["ranked"][0]
    as_it_is = real.post("/v1/rank", json=body | {"changes": None}).json()["ranked"][0]
    assert forgotten["score"] < as_it_is["score"]


@pytest.mark.parametrize(
    ("changes", "where", "is_known_before"),
    [
        ({"removed": [0, 3]}, ["removed", 1], False),
        ({"added": [{"scene": "purchase", "item_id": "zzz"}]}, ["added", 0, "item_id"], False),
        ({"added": [{"scene": "purchase", "text": " \u3000"}]}, ["added", 0, "text"], True),
        ({"added": [{"scene": "purchase"}]}, ["added", 0], True),
    ],
)
def test_a_change_that_cannot_be_names_its_field(
    real: TestClient, changes: dict[str, Any], where: list[str | int], *, is_known_before: bool
) -> None:
    body = {"user_id": "ann", "changes": changes}
    for refused in (
        real.post("/v1/rank", json=body),
        real.post("/v1/explain", json=body | {"item_id": "L1"}),
    ):
        assert refused.status_code == 422
        assert [one["loc"] for one in refused.json()["detail"]] == [["body", "changes", *where]]
    # In a batch what needs no look at the user refuses all; the rest fails alone, and says where.
    batch = real.post("/v1/rank:batch", json={"requests": [{"user_id": "bob"}, body]})
    if is_known_before:
        assert batch.status_code == 422
        assert [one["loc"] for one in batch.json()["detail"]] == [
            ["body", "requests", 1, "changes", *where]
        ]
    else:
        good, bad = batch.json()["results"]
        assert good["ranked"]
        list_name, place, *rest = where
        assert bad["error"].startswith(
            f"changes.{list_name}[{place}]{''.join(f'.{r}' for r in rest)}: "
        )


def test_a_real_explanation_tells_what_spoke_for_the_item(real: TestClient) -> None:
    answer = real.post("/v1/explain", json={"user_id": "ann", "item_id": "L1"}).json()
    assert answer["score"] > answer["score_without_history"]
    assert answer["contributions"][0]["text"] == "red lamp"
    ranked = real.post("/v1/rank", json={"user_id": "ann", "top_k": 1, "explain": True}).json()
    assert ranked["ranked"][0]["contributions"][0] == answer["contributions"][0]
    similar = real.get("/v1/items/L1/similar", params={"top_k": 1}).json()["similar"]
    assert similar[0]["item_id"] == "L2"


def test_a_mistake_of_the_operator_is_a_sentence(
    real: TestClient, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.reader.user_dense_names = ("other",)
    with caplog.at_level(logging.ERROR):
        response = real.post("/v1/rank", json={"user_id": "ann"})
    assert response.status_code == 503
    assert "reads feature 'activity' of users, which the feature store" in response.json()["detail"]
    assert "/v1/rank" in caplog.text
