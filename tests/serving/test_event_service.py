"""What takes live events opens late, tries again, and leaves a store that fails alone."""

import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from feature_repo.artifact import load_run_manifest
from feature_repo.errors import LongtrailError, StoreError
from feature_repo.home import Home
from feature_repo.manifest import load_manifest
from feature_repo.publish import FILES_PROFILE
from serving.app import create_app
from serving.breaker import Breaker, CircuitOpenError
from serving.deployment import Deployment
from serving.event_rules import LiveEvent
from serving.event_service import FollowingEvents
from tests.live_home import RUN, live_home
from tests.serving.stand_in import StandIn, toy_directory

RESET_S = 0.3


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Home]:
    with live_home(tmp_path_factory.mktemp("late"), FILES_PROFILE, request) as home:
        yield home


@pytest.fixture
def broken(home: Home) -> Iterator[Path]:
    """A journal that is no database."""
    home.live_events.write_bytes(b"no database " * 100)
    yield home.live_events
    home.live_events.unlink(missing_ok=True)


def open_events(home: Home, *, fail_max: int = 2) -> FollowingEvents:
    manifest = load_run_manifest(home, RUN)
    breaker = Breaker("what takes live events", fail_max=fail_max, reset_s=RESET_S)
    return FollowingEvents(home, FILES_PROFILE, lambda: manifest, breaker=breaker)


def event() -> LiveEvent:
    return LiveEvent(uuid.uuid4().hex, "u1", "buy", "word1 word2")


def test_a_store_that_fails_at_the_start_is_tried_again(home: Home, broken: Path) -> None:
    events = open_events(home)
    for _ in range(2):
        with pytest.raises(StoreError, match="is not a database"):
            events.accept([event()])
    broken.unlink()
    with pytest.raises(CircuitOpenError, match="the store is tried again in"):
        events.accept([event()])  # nothing was asked
    time.sleep(RESET_S + 0.05)
    assert events.accept([event()]).accepted == 1
    events.close()


def test_callers_are_told_to_come_again(home: Home, broken: Path) -> None:
    app = create_app(Deployment(StandIn()), directory=toy_directory(), events=open_events(home))
    body = {"events": [{"event_id": "1", "user_id": "u1", "scene": "buy", "text": "word1"}]}
    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.post("/v1/events", json=body)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        broken.unlink()
        assert client.post("/v1/events", json=body).json()["accepted"] == 1


def test_a_step_that_is_missing_may_still_be_run(home: Home) -> None:
    vectors = home.embeddings / load_run_manifest(home, RUN).encoder_fingerprint
    vectors.replace(vectors.with_name("away"))
    encoder = home.encoder.read_bytes()
    try:
        events = open_events(home)
        with pytest.raises(StoreError, match="live events cannot be taken yet"):
            events.accept([event()])
    finally:
        vectors.with_name("away").replace(vectors)
        home.encoder.write_bytes(encoder)
    assert events.accept([event()]).accepted == 1
    events.close()


def test_a_data_set_that_is_known_too_late_is_refused_for_good(home: Home) -> None:
    manifest = load_manifest(home)
    manifest.model_copy(update={"availability_delay_us": 3_600_000_000}).save(home.manifest)
    try:
        with pytest.raises(LongtrailError, match=r"availability_delay_s of at most 0\.001, got"):
            open_events(home)
    finally:
        manifest.save(home.manifest)
