"""Users, items and events over HTTP."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serving.app import create_app
from serving.deployment import Deployment
from serving.event_rules import LiveEvent
from tests.serving.conftest import ITEMS
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


LONG = "x" * 257


# Users and items.
def test_user(client: TestClient) -> None:
    response = client.get("/v1/users/ann")
    assert response.status_code == 200
    assert strict(response.text) == {
        "user_id": "ann",
        "known": True,
        "at": "2024-06-01T12:00:00Z",
        "history": [
            {
                "text": "red lamp",
                "scene": "purchase",
                "time": "2024-05-20T12:00:00Z",
                "item_id": "L1",
            },
            {
                "text": "looking for a lamp",
                "scene": "search",
                "time": "2024-05-12T12:00:00Z",
                "item_id": None,
            },
        ],
        "totals": {"purchase": 2, "search": 1},
        "features": {"activity": 0.5},
        "feature_age_s": 12 * 86_400,
    }


def test_features_that_are_missing_are_null(client: TestClient) -> None:
    answer = strict(client.get("/v1/users/nobody").text)
    assert answer["known"] is False
    assert answer["features"] == {"activity": None}
    assert answer["feature_age_s"] is None


@pytest.mark.parametrize("path", ["/v1/users/a%2Fb%20%C3%BC", "/v1/items/a%2Fb%20%C3%BC"])
def test_an_id_with_a_slash_and_spaces(path: str) -> None:
    directory = toy_directory({"a/b ü": ITEMS["L1"]})
    app = create_app(Deployment(StandIn()), directory=directory)
    with client_of(app) as client:
        answer = client.get(path).json()
    assert "a/b ü" in (answer.get("user_id"), answer.get("item_id"))


@pytest.mark.parametrize("bad_id", [LONG, "a%00b", "%7F", ""])
@pytest.mark.parametrize(
    ("path", "name"),
    [("/v1/users/{}", "user_id"), ("/v1/items/{}", "item_id"), ("/v1/items/{}/similar", "item_id")],
)
def test_a_malformed_id_in_the_path(client: TestClient, path: str, name: str, bad_id: str) -> None:
    response = client.get(path.format(bad_id))
    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"] == ["path", name]


def test_users_are_found_by_the_beginning_of_their_ids(client: TestClient) -> None:
    assert client.get("/v1/users").json() == {"users": ["ann", "bob", "idle"]}
    assert client.get("/v1/users", params={"limit": 1}).json() == {"users": ["ann"]}
    assert client.get("/v1/users", params={"prefix": "b"}).json() == {"users": ["bob"]}


def test_items_are_found_by_title(client: TestClient) -> None:
    answer = client.get("/v1/items", params={"query": "boat"}).json()
    assert answer["items"] == [
        {"item_id": "B2", "text": "row boat"},
        {"item_id": "B1", "text": "sail boat"},
    ]
    assert client.get("/v1/items/B1").json() == {"item_id": "B1", "text": "sail boat"}
    unknown = client.get("/v1/items/B9")
    assert unknown.status_code == 404
    assert unknown.json() == {"detail": "no such item in the data set"}


def test_similar_items(client: TestClient) -> None:
    answer = client.get("/v1/items/L1/similar", params={"top_k": 1})
    nearest = {"item_id": "L2", "text": "green lamp", "similarity": 0.5}
    assert answer.json() == {"item_id": "L1", "similar": [nearest]}
    assert client.get("/v1/items/B9/similar").status_code == 404


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/v1/users?limit=0", ["query", "limit"]),
        ("/v1/users?limit=101", ["query", "limit"]),
        ("/v1/users?prefix=%00", ["query", "prefix"]),
        ("/v1/items", ["query", "query"]),
        (f"/v1/items?query={LONG}", ["query", "query"]),
        ("/v1/items/L1/similar?top_k=x", ["query", "top_k"]),
    ],
)
def test_a_malformed_query_names_its_field(client: TestClient, path: str, place: list[str]) -> None:
    response = client.get(path)
    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"] == place


# Events.
EVENT = {"event_id": "e1", "user_id": "ann", "scene": "purchase", "item_id": "L1"}


def test_events() -> None:
    taken = EventList()
    app = create_app(Deployment(StandIn()), directory=toy_directory(), events=taken)
    events = [
        EVENT,
        EVENT | {"event_id": "e2", "event_timestamp": "2024-05-01T10:00:00+02:00", "text": "x"},
        EVENT | {"event_id": "e3", "scene": "never"},
    ]
    with client_of(app) as client:
        first = client.post("/v1/events", json={"events": events})
        again = client.post("/v1/events", json={"events": events[:1]})
    assert first.status_code == 200
    assert first.json() == {
        "accepted": 2,
        "duplicates": 0,
        "rejected": [{"index": 2, "reason": "there is no such scene; expected purchase, search"}],
    }
    assert again.json() == {"accepted": 0, "duplicates": 1, "rejected": []}
    assert taken.events["e1"] == LiveEvent("e1", "ann", "purchase", item_id="L1")
    assert taken.events["e2"].event_timestamp == datetime(2024, 5, 1, 8, tzinfo=UTC)


@pytest.mark.parametrize(
    ("events", "place"),
    [
        ([], ["body", "events"]),
        ([EVENT] * 1001, ["body", "events"]),
        ([EVENT, EVENT | {"user_id": "bob"}], ["body", "events", 1, "event_id"]),
        ([EVENT, EVENT | {"event_id": " e1 "}], ["body", "events", 1, "event_id"]),
        (EVENT, ["body", "events"]),
    ],
)
def test_malformed_posts_of_events(client: TestClient, events: Any, place: list[Any]) -> None:
    response = client.post("/v1/events", json={"events": events})
    assert response.status_code == 422
    assert place in [problem["loc"] for problem in response.json()["detail"]]


def test_a_malformed_event_refuses_no_other() -> None:
    bad: list[tuple[Any, str]] = [
        ({"event_id": "e1"}, "user_id: This field is needed"),
        (EVENT | {"text": ""}, "text: String should have at least 1 character"),
        (EVENT | {"text": "a\tb"}, "text: Control characters are not taken"),
        (EVENT | {"event_timestamp": 1}, "event_timestamp: Value error, expected a date and time"),
        (
            EVENT | {"event_timestamp": "2024-05-01T10:00:00"},
            "event_timestamp: Input should have timezone info",
        ),
        (
            EVENT | {"price": 7},
            "This field is unknown; there are event_id, user_id, scene, text, item_id, event_time",
        ),
        ("purchase", "A JSON object is expected"),
    ]
    taken = EventList()
    app = create_app(Deployment(StandIn()), directory=toy_directory(), events=taken)
    good = [EVENT | {"event_id": "first"}, EVENT | {"event_id": "last"}]
    never = EVENT | {"event_id": "never", "scene": "never"}
    events = [good[0], *(event for event, _ in bad), never, good[1]]
    with client_of(app) as client:
        response = client.post("/v1/events", json={"events": events})
        nothing = client.post("/v1/events", json={"events": ["purchase"]})
    assert response.status_code == 200
    answer = response.json()
    assert answer["accepted"] == 2
    assert list(taken.events) == ["first", "last"]
    assert [one["index"] for one in answer["rejected"]] == list(range(1, len(bad) + 2))
    for rejected, (_, wanted) in zip(answer["rejected"], bad, strict=False):
        assert rejected["reason"].startswith(wanted)
    assert answer["rejected"][-1]["reason"].startswith("there is no such scene")
    (only,) = nothing.json()["rejected"]
    assert only["reason"].startswith("A JSON object is expected")


def test_a_service_without_a_journal_says_that_it_takes_no_events() -> None:
    app = create_app(Deployment(StandIn()), directory=toy_directory())
    assert "/v1/events" not in app.openapi()["paths"]
    with client_of(app) as client:
        refused = client.post("/v1/events", json={"events": [EVENT]})
    assert refused.status_code == 404
    assert "--no-events" in refused.json()["detail"]
