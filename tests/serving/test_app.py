import json
import math
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from numpy.typing import NDArray

from feature_repo.errors import StoreError
from feature_repo.features import UserFeatures
from serving.app import create_app
from serving.artifact import Artifact
from tests.serving.conftest import NOW, ToyReader, ToyUser, World, toy_manifest


@pytest.fixture
def client(world: World) -> Iterator[TestClient]:
    with TestClient(create_app(world.ranker()), raise_server_exceptions=False) as client:
        yield client


def strict(text: str) -> Any:
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(name: str) -> None:
        pytest.fail(f"{name} in {text}")

    return json.loads(text, parse_constant=refuse)


def test_rank(client: TestClient, world: World) -> None:
    response = client.post("/v1/rank", json={"user_id": "ann", "top_k": 2})
    assert response.status_code == 200
    answer = strict(response.text)
    expected = world.ranker().rank("ann", top_k=2)
    assert answer == {
        "user_id": "ann",
        "known": True,
        "model": "toy-run",
        "ranked": [
            {"item_id": i.item_id, "text": i.text, "score": i.score, "reason": i.reason}
            for i in expected.ranked
        ],
        "unknown_items": [],
        "notes": [],
    }
    assert [item["item_id"] for item in answer["ranked"]] == ["L1", "L2"]


def test_rank_candidates_with_context(client: TestClient) -> None:
    body = {"user_id": "ann", "candidates": ["B1", "zzz"], "context": {"slot": 2}}
    with_slot = client.post("/v1/rank", json=body).json()
    without = client.post("/v1/rank", json=body | {"context": {}}).json()
    assert with_slot["unknown_items"] == ["zzz"]
    assert with_slot["notes"] == ["1 unknown item left out"]
    (entry,), (plain,) = with_slot["ranked"], without["ranked"]
    assert entry["item_id"] == "B1"
    logits = [math.log(e["score"] / (1 - e["score"])) for e in (entry, plain)]
    assert logits[0] - logits[1] == pytest.approx(2, abs=1e-4)


def test_rank_takes_ten_by_default_and_a_thousand_at_most(client: TestClient) -> None:
    body = {"user_id": "ann", "candidates": [f"i{i}" for i in range(1000)], "top_k": 1000}
    response = client.post("/v1/rank", json=body)
    assert response.status_code == 200
    assert len(response.json()["unknown_items"]) == 1000
    assert response.json()["ranked"] == []
    assert "nothing to rank" in response.json()["notes"][-1]


def test_unknown_user_gets_an_answer(client: TestClient) -> None:
    answer = client.post("/v1/rank", json={"user_id": "nobody"}).json()
    assert answer["known"] is False
    assert len(answer["ranked"]) == 6
    assert answer["notes"] == ["unknown user: ranked by the model with an empty history"]


LONG = "x" * 257


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({}, ["body", "user_id"]),
        ({"user_id": None}, ["body", "user_id"]),
        ({"user_id": 17}, ["body", "user_id"]),
        ({"user_id": ""}, ["body", "user_id"]),
        ({"user_id": LONG}, ["body", "user_id"]),
        ({"user_id": "a\nb"}, ["body", "user_id"]),
        ({"user_id": "a", "top_k": 0}, ["body", "top_k"]),
        ({"user_id": "a", "top_k": 1001}, ["body", "top_k"]),
        ({"user_id": "a", "top_k": 2.5}, ["body", "top_k"]),
        ({"user_id": "a", "top_k": "5"}, ["body", "top_k"]),
        ({"user_id": "a", "top_k": True}, ["body", "top_k"]),
        ({"user_id": "a", "candidates": []}, ["body", "candidates"]),
        ({"user_id": "a", "candidates": "L1"}, ["body", "candidates"]),
        ({"user_id": "a", "candidates": ["i"] * 1001}, ["body", "candidates"]),
        ({"user_id": "a", "candidates": ["L1", 3]}, ["body", "candidates", 1]),
        ({"user_id": "a", "candidates": ["L1", LONG]}, ["body", "candidates", 1]),
        ({"user_id": "a", "context": [1]}, ["body", "context"]),
        ({"user_id": "a", "context": {"slot": "1"}}, ["body", "context", "slot"]),
        ({"user_id": "a", "context": {"slot": None}}, ["body", "context", "slot"]),
        ({"user_id": "a", "context": {"hour": 1.0}}, ["body", "context", "hour"]),
        ({"user_id": "a", "user": "b"}, ["body", "user"]),
        ([], ["body"]),
        ("text", ["body"]),
    ],
)
def test_malformed_body_names_its_field(client: TestClient, body: Any, place: list[Any]) -> None:
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
def test_body_that_json_libraries_disagree_on(
    client: TestClient, body: str, place: list[Any]
) -> None:
    response = client.post("/v1/rank", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 422
    assert place in [problem["loc"] for problem in strict(response.text)["detail"]]


@pytest.mark.parametrize("body", [b"\xff\xfe\xfa", b'{"a": ' * 100_000, b'{"a": ' + b"1" * 5_000])
def test_body_that_is_no_json_at_all(client: TestClient, body: bytes) -> None:
    response = client.post("/v1/rank", content=body, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422)
    assert strict(response.text)["detail"]


def test_the_input_is_not_echoed(client: TestClient) -> None:
    response = client.post("/v1/rank", json={"user_id": "secret-" * 100})
    assert response.status_code == 422
    assert "secret" not in response.text


def test_user_features(client: TestClient) -> None:
    response = client.get("/v1/users/ann/features")
    assert response.status_code == 200

    def days_ago(days: int) -> str:
        return (NOW - timedelta(days=days)).isoformat().replace("+00:00", "Z")

    assert strict(response.text) == {
        "user_id": "ann",
        "known": True,
        "at": days_ago(0),
        "sequences": {
            "purchase": {
                "total": 2,
                "behaviors": [
                    {"text": "red lamp", "time": days_ago(12)},
                    {"text": "red lamp", "time": days_ago(40)},
                ],
            },
            "search": {
                "total": 1,
                "behaviors": [{"text": "looking for a lamp", "time": days_ago(20)}],
            },
        },
        "dense": {"activity": 0.5},
    }


def test_features_that_are_missing_are_null(client: TestClient) -> None:
    answer = strict(client.get("/v1/users/nobody/features").text)
    assert answer["known"] is False
    assert answer["dense"] == {"activity": None}
    assert answer["sequences"] == {
        "purchase": {"total": 0, "behaviors": []},
        "search": {"total": 0, "behaviors": []},
    }


def test_user_id_with_a_slash_and_spaces(client: TestClient, world: World) -> None:
    world.reader.users["a/b ü"] = ToyUser(activity=1.0)
    answer = client.get("/v1/users/a%2Fb%20%C3%BC/features").json()
    assert (answer["user_id"], answer["known"]) == ("a/b ü", True)


@pytest.mark.parametrize("user_id", [LONG, "a%00b", "%7F"])
def test_malformed_user_id_in_the_path(client: TestClient, user_id: str) -> None:
    response = client.get(f"/v1/users/{user_id}/features")
    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"] == ["path", "user_id"]


def test_health(client: TestClient) -> None:
    assert client.get("/healthz").json() == {
        "status": "ok",
        "run": "toy-run",
        "encoder_fingerprint": "toy-encoder",
        "dataset": "toy-shop",
    }


def test_other_addresses_and_methods(client: TestClient) -> None:
    assert client.get("/nothing").status_code == 404
    assert client.get("/v1/rank").status_code == 405


def test_a_mistake_of_the_operator_is_a_sentence(client: TestClient, world: World) -> None:
    world.reader.user_dense_names = ("other",)
    response = client.post("/v1/rank", json={"user_id": "ann"})
    assert response.status_code == 503
    assert "reads feature 'activity' of users, which the feature store" in response.json()["detail"]


class FailingReader(ToyReader):
    """A store that fails in the middle of a read."""

    def __init__(self, error: Exception) -> None:
        super().__init__({}, {})
        self.error = error

    def online_users(self, user_ids: NDArray[np.object_], *, at: Any = None) -> UserFeatures:
        raise self.error


@pytest.mark.parametrize(
    ("error", "status", "detail"),
    [
        (StoreError("the store is away: start it"), 503, "the store is away: start it"),
        (RuntimeError("password=hunter2"), 500, "internal error"),
    ],
)
def test_no_stack_trace(world: World, error: Exception, status: int, detail: str) -> None:
    world.reader = FailingReader(error)
    with TestClient(create_app(world.ranker()), raise_server_exceptions=False) as client:
        for response in (
            client.post("/v1/rank", json={"user_id": "ann"}),
            client.get("/v1/users/ann/features"),
        ):
            assert response.status_code == status
            assert response.json() == {"detail": detail}


def test_openapi_has_examples_that_are_valid(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/rank",
        "/v1/users/{user_id}/features",
        "/healthz",
    }
    examples = document["components"]["schemas"]["RankRequest"]["examples"]
    assert len(examples) == 2
    for example in examples:
        assert client.post("/v1/rank", json=example).status_code == 200
    assert document["components"]["schemas"]["RankRequest"]["additionalProperties"] is False
    responses = document["paths"]["/v1/rank"]["post"]["responses"]
    assert {"200", "422", "503"} <= set(responses)


def test_context_of_a_model_that_reads_none(world: World) -> None:
    ranker = world.ranker(Artifact(toy_manifest(context_names=()), world.artifact.score))
    with TestClient(create_app(ranker)) as client:
        response = client.post("/v1/rank", json={"user_id": "a", "context": {"slot": 1}})
    assert response.status_code == 422
    assert response.json()["detail"][0]["msg"].endswith("it reads none")
