"""The service about itself over HTTP: state, failures, its description."""

import asyncio
import json
import math
import threading
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from feature_repo.errors import ArtifactError, LongtrailError, StoreError
from serving import responses, schemas
from serving.answers import UnusableChangeError
from serving.app import AppSettings, create_app
from serving.breaker import CircuitOpenError
from serving.deployment import WAITING_RETRY_S, Deployment
from serving.schemas import Body
from tests.serving.stand_in import (
    EventList,
    StandIn,
    client_of,
    stand_in_app,
    strict,
    toy_directory,
)


@pytest.fixture
def ranker() -> StandIn:
    return StandIn()


@pytest.fixture
def client(ranker: StandIn) -> Iterator[TestClient]:
    with client_of(stand_in_app(ranker)) as client:
        yield client


# The service about itself.
def test_model_card(client: TestClient) -> None:
    answer = strict(client.get("/v1/model").text)
    assert answer["run"] == "toy-run"
    assert answer["encoder_fingerprint"] == "toy-encoder"
    assert answer["context_names"] == ["slot"]
    assert (answer["num_items"], answer["items_at"]) == (6, "2024-06-01T12:00:00Z")
    assert answer["shadow"] is answer["calibration"] is None


def test_metrics_without_a_value_are_null_in_the_model_card() -> None:
    ranker = StandIn(metrics={"test": {"auc": math.nan}})
    with client_of(stand_in_app(ranker)) as client:
        assert strict(client.get("/v1/model").text)["metrics"] == {"test": {"auc": None}}


class SlowCard(StandIn):
    """Tells of its items only where nobody else waits for it."""

    @property
    def num_items(self) -> int:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        return 7

    @num_items.setter
    def num_items(self, _: int) -> None:
        pass


def test_the_model_card_is_made_beside_the_event_loop() -> None:
    with client_of(stand_in_app(SlowCard())) as client:
        answer = client.get("/v1/model")
    assert answer.status_code == 200
    assert answer.json()["num_items"] == 7


def test_ready_while_the_store_answers(ranker: StandIn) -> None:
    client = client_of(stand_in_app(ranker, check_age_s=0))
    assert client.get("/readyz").json() == {"ready": True, "run": "toy-run", "notes": []}

    def away() -> None:
        raise StoreError("the store is away: start it")

    ranker.before = away
    response = client.get("/readyz")
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0
    assert response.json() == {
        "ready": False,
        "run": "toy-run",
        "notes": [],
        "detail": "the store is away: start it",
    }
    assert client.get("/healthz").json() == {"status": "ok"}


def test_the_store_is_looked_at_once_in_a_while_however_many_ask() -> None:
    looks: list[None] = []

    def count() -> None:
        looks.append(None)
        raise StoreError("the store is away: start it")

    deployment = Deployment(StandIn(before=count))
    app = create_app(
        deployment, directory=toy_directory(), settings=AppSettings(check_age_s=3600.0)
    )
    with client_of(app) as client:
        assert [client.get("/readyz").status_code for _ in range(5)] == [503] * 5
        assert len(looks) == 1
        deployment.swap(StandIn("other-run"))  # another ranker is another look
        assert client.get("/readyz").json()["ready"]


def test_ready_tells_of_a_run_that_could_not_be_loaded() -> None:
    deployment = Deployment(StandIn())
    deployment.keep("new-run", "it has no program")
    with client_of(create_app(deployment, directory=toy_directory())) as client:
        answer = client.get("/readyz")
    assert answer.status_code == 200
    sentence = "run new-run cannot be served, toy-run still is: it has no program"
    assert answer.json()["notes"] == [sentence]


def test_without_a_model_every_answer_says_so_until_there_is_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    deployment = Deployment(None)
    deployment.keep("toy-run", "Redis does not answer: start it")
    caplog.clear()
    sentence = "run toy-run cannot be served yet: Redis does not answer: start it"
    app = create_app(deployment, directory=toy_directory(), events=EventList())
    user = {"user_id": "ann"}
    with client_of(app) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        assert "longtrail_model_info{" not in client.get("/metrics").text
        ready = client.get("/readyz")
        assert ready.status_code == 503
        assert ready.json() == {"ready": False, "run": None, "notes": [], "detail": sentence}
        responses.ReadyResponse.model_validate(ready.json())
        for answer in (
            ready,
            client.post("/v1/rank", json=user),
            client.post("/v1/rank:batch", json={"requests": [user]}),
            client.post("/v1/explain", json=user | {"item_id": "L1"}),
            client.get("/v1/users/ann"),
            client.get("/v1/items/L1/similar"),
            client.get("/v1/model"),
        ):
            assert answer.status_code == 503
            assert answer.json()["detail"] == sentence
            assert int(answer.headers["retry-after"]) == WAITING_RETRY_S
        assert client.post("/v1/rank", json={}).status_code == 422
        assert not [one for one in caplog.records if one.levelname == "ERROR"]  # once for each try

        deployment.swap(StandIn())
        assert client.get("/readyz").json() == {"ready": True, "run": "toy-run", "notes": []}
        assert client.post("/v1/rank", json=user).status_code == 200
        assert 'run="toy-run"} 1.0' in client.get("/metrics").text


def test_probes_may_ask_for_the_head_alone(client: TestClient) -> None:
    for path in ("/healthz", "/readyz"):
        assert client.head(path).status_code == 200


def test_other_addresses_and_methods(client: TestClient) -> None:
    for path in ("/nothing", "/v1/nothing", "/docs"):
        assert client.get(path).status_code == 404
        assert client.get(path).json() == {"detail": "Not Found"}
    assert client.get("/v1/rank").status_code == 405
    assert client.delete("/v1/users/ann").status_code == 405


def test_the_page_is_at_the_root(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert "<html" in page.text
    assert page.headers["cache-control"] == "no-cache"
    assert client.get("/../app.py").status_code == 404


# Failures.
@pytest.mark.parametrize(
    ("error", "status", "detail", "retry_after"),
    [
        (StoreError("the store is away: start it"), 503, "the store is away: start it", "1"),
        (ArtifactError("run x lacks y"), 503, "run x lacks y", "1"),
        (CircuitOpenError("away", retry_after_s=2.1), 503, "away", "3"),
        (RuntimeError("password=hunter2"), 500, "internal error", None),
    ],
)
def test_no_stack_trace(
    error: Exception,
    status: int,
    detail: str,
    retry_after: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> None:
        raise error

    with client_of(stand_in_app(StandIn(before=fail))) as client:
        for response in (
            client.post("/v1/rank", json={"user_id": "ann"}),
            client.get("/v1/users/ann"),
        ):
            assert response.status_code == status
            assert response.json() == {"detail": detail}
            assert response.headers.get("retry-after") == retry_after
            assert response.headers["x-request-id"]
            assert response.headers["x-content-type-options"] == "nosniff"
    defects = [record for record in caplog.records if record.exc_info]
    assert len(defects) == (2 if status == 500 else 0)


@pytest.mark.parametrize(
    ("error", "where", "sentence"),
    [
        (
            UnusableChangeError("the history has 3 behaviours", place=("removed", 0)),
            ["body", "changes", "removed", 0],
            "the history has 3 behaviours",
        ),
        (LongtrailError("top_k must be at least 1"), ["body"], "top_k must be at least 1"),
    ],
)
def test_what_the_ranker_finds_wrong_with_a_request_is_the_callers_fault(
    error: LongtrailError, where: list[str | int], sentence: str
) -> None:
    def fail() -> None:
        raise error

    with client_of(stand_in_app(StandIn(before=fail))) as client:
        response = client.post("/v1/rank", json={"user_id": "ann"})
    assert response.status_code == 422
    assert response.json()["detail"] == [{"loc": where, "msg": sentence, "type": "unusable"}]


def test_more_than_can_wait_is_refused_at_once_and_the_loop_goes_on() -> None:
    started, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        started.set()
        assert go_on.wait(20)

    answers: list[int] = []
    app = stand_in_app(StandIn(before=wait), threads=1, max_waiting=0)
    with client_of(app) as asked:

        def ask() -> None:
            answers.append(asked.post("/v1/rank", json={"user_id": "ann"}).status_code)

        asking = threading.Thread(target=ask)
        asking.start()
        assert started.wait(20)
        refused = asked.post("/v1/rank", json={"user_id": "ann"})
        assert asked.get("/healthz").status_code == 200
        go_on.set()
        asking.join()
        assert asked.post("/v1/rank", json={"user_id": "ann"}).status_code == 200
        metrics = asked.get("/metrics").text
    assert answers == [200]
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["detail"].startswith("overloaded")
    assert 'longtrail_requests_refused_total{reason="overloaded"} 1.0' in metrics


# Its description.
def test_openapi_describes_every_address(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/rank",
        "/v1/rank:batch",
        "/v1/explain",
        "/v1/events",
        "/v1/users",
        "/v1/users/{user_id}",
        "/v1/items",
        "/v1/items/{item_id}",
        "/v1/items/{item_id}/similar",
        "/v1/model",
        "/healthz",
        "/readyz",
        "/metrics",
    }
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["summary"]
            if path.startswith("/v1/"):
                assert {"200", "401", "422", "429", "503"} <= set(operation["responses"])
    assert document["components"]["schemas"]["RankRequest"]["additionalProperties"] is False


MODELS = [
    one
    for module in (schemas, responses)
    for one in vars(module).values()
    if isinstance(one, type) and issubclass(one, Body) and one.model_config.get("json_schema_extra")
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_the_examples_are_valid(model: type[Body]) -> None:
    extra = model.model_config["json_schema_extra"]
    assert isinstance(extra, dict)
    found = extra["examples"]
    assert isinstance(found, list)
    assert found
    for example in found:
        model.model_validate_json(json.dumps(example))
