import asyncio
import re
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from prometheus_client import Counter
from prometheus_client.parser import text_string_to_metric_families

from serving.app import create_app
from serving.deployment import Deployment
from serving.metrics import PREFIX, Metrics, Rising, degraded_kind
from tests.serving.stand_in import EventList, StandIn, toy_directory


@pytest.fixture
def deployment() -> Deployment:
    return Deployment(StandIn())


@pytest.fixture
def client(deployment: Deployment) -> Iterator[TestClient]:
    app = create_app(deployment, directory=toy_directory(), events=EventList())
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def values(client: TestClient) -> dict[str, float]:
    """Every sample, as ``name{label="value"}`` without the prefix, labels sorted."""
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            name = sample.name.removeprefix(PREFIX)
            found[f"{name}{{{labels}}}" if labels else name] = sample.value
    return found


def test_requests_are_counted_by_route_and_timed(client: TestClient) -> None:
    for user_id in ("ann", "bob"):
        client.get(f"/v1/users/{user_id}")
    client.post("/v1/rank", json={})
    client.get("/nothing")
    found = values(client)
    assert found['requests_total{method="GET",route="/v1/users/{user_id}",status="200"}'] == 2
    assert found['requests_total{method="POST",route="/v1/rank",status="422"}'] == 1
    assert found['requests_total{method="other",route="other",status="404"}'] == 1
    assert found['request_seconds_count{method="GET",route="/v1/users/{user_id}"}'] == 2
    assert 0 < found['request_seconds_sum{method="GET",route="/v1/users/{user_id}"}'] < 10
    assert found["requests_in_flight"] == 1  # the one that asks


def test_paths_that_nobody_has_make_no_series(client: TestClient) -> None:
    for number in range(5):
        client.get(f"/nothing/{number}")
        client.request(f"METHOD{number}", "/v1/rank")
    assert len([name for name in values(client) if name.startswith("requests_total")]) < 8


def test_rankings(client: TestClient) -> None:
    client.post("/v1/rank", json={"user_id": "ann", "candidates": ["L1", "x", "y"]})
    batch = [{"user_id": "nobody"}, {"user_id": "ann"}]
    client.post("/v1/rank:batch", json={"requests": batch})
    found = values(client)
    assert found['rankings_total{path="cached"}'] == 2
    assert found['rankings_total{path="live"}'] == 1
    assert found['rank_stage_seconds_count{stage="model"}'] == 3
    assert found['rank_stage_seconds_sum{stage="model"}'] == pytest.approx(0.012)
    assert found["feature_age_seconds_count"] == 2
    assert found['feature_age_seconds_bucket{le="604800.0"}'] == 0  # 12 days
    assert found['feature_age_seconds_bucket{le="1.2096e+06"}'] == 2
    assert found["missing_features_ratio_sum"] == 0.5
    assert found["cold_starts_total"] == 1
    assert found["unknown_items_total"] == 2
    assert found['degraded_total{kind="store away"}'] == 1


def test_events(client: TestClient) -> None:
    event = {"user_id": "ann", "scene": "purchase", "text": "x"}
    events = [event | {"event_id": "a"}, event | {"event_id": "b", "scene": "never"}]
    for _ in range(2):
        client.post("/v1/events", json={"events": events})
    found = values(client)
    assert found['events_total{outcome="accepted"}'] == 1
    assert found['events_total{outcome="duplicate"}'] == 1
    assert found['events_total{outcome="rejected"}'] == 2


def test_the_model_that_serves(client: TestClient, deployment: Deployment) -> None:
    labels = 'dataset="toy-shop",encoder="toy-encoder",recipe="toy",run="{}"'
    assert values(client)["model_info{" + labels.format("toy-run") + "}"] == 1
    deployment.swap(StandIn("other-run"))
    deployment.keep("broken-run", "it has no program")
    found = values(client)
    assert found["model_info{" + labels.format("toy-run") + "}"] == 0
    assert found["model_info{" + labels.format("other-run") + "}"] == 1
    assert found['model_loads_total{outcome="loaded"}'] == 1
    assert found['model_loads_total{outcome="failed"}'] == 1


def test_what_is_sampled_is_up_to_date() -> None:
    deployment = Deployment(StandIn())
    failures = Rising(deployment.metrics.store_failures)
    counted = [3, 5, 5, 6]
    app = create_app(
        deployment, directory=toy_directory(), samplers=[lambda: failures.to(counted.pop(0))]
    )
    client = TestClient(app)  # not entered: nothing samples in the background
    assert [values(client)["store_failures_total"] for _ in range(4)] == [3, 5, 5, 6]


def test_a_sampler_that_fails_stops_no_other_and_is_told_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    deployment = Deployment(StandIn())
    failures = Rising(deployment.metrics.store_failures)
    counted = [3, 5]

    def broken() -> None:
        raise RuntimeError("a defect in a sampler")

    app = create_app(
        deployment,
        directory=toy_directory(),
        samplers=[broken, lambda: failures.to(counted.pop(0))],
    )
    client = TestClient(app)
    assert [values(client)["store_failures_total"] for _ in range(2)] == [3, 5]
    (told,) = [record for record in caplog.records if record.exc_info]
    assert "metrics cannot be brought up to date" in told.getMessage()


def test_what_prometheus_reads_is_made_beside_the_event_loop() -> None:
    where: list[bool] = []

    def sampler() -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            where.append(False)
        else:
            where.append(True)

    app = create_app(Deployment(StandIn()), directory=toy_directory(), samplers=[sampler])
    assert TestClient(app).get("/metrics").status_code == 200
    assert where == [False]


def test_rising() -> None:
    counter = Counter("a_total", "a", registry=None)
    rising = Rising(counter)
    for number in (2, 2, 7, 5, 7):  # the 5 was read before the 7, in another thread
        rising.to(number)
    assert counter._value.get() == 7


def test_names_and_units_are_as_prometheus_has_them() -> None:
    for family in Metrics().registry.collect():
        assert family.name.startswith(PREFIX)
        assert family.documentation
        assert not re.search(r"_(ms|milliseconds|percent)$", family.name)


def test_kinds_of_degradation_are_few() -> None:
    sentence = "the feature store does not answer: ranked with an empty history for ann"
    assert degraded_kind(sentence) == "the feature store does not answer"
