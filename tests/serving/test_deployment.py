"""Hot swap: the run that is served changes, and no request notices."""

import json
import logging
import threading
from collections.abc import Iterator
from functools import partial

import pytest
from fastapi.testclient import TestClient

from feature_repo.artifact import set_current_run
from feature_repo.errors import ArtifactError
from feature_repo.home import Home
from serving.app import create_app
from serving.deployment import Deployment, HomeFollower, NotLoadedError
from tests import waiting
from tests.serving.stand_in import StandIn, toy_directory

wait_until = partial(waiting.wait_until, most_s=30, poll_s=0.005)


class Opener:
    """Opens stand-ins, except for runs whose names say otherwise."""

    def __init__(self) -> None:
        self.opened: list[StandIn] = []
        self.mended = False

    def __call__(self, run: str) -> StandIn:
        if run.startswith("broken") and not self.mended:
            raise ArtifactError(f"{run} has no program: train again")
        if run.startswith("defect"):
            raise KeyError(run)
        self.opened.append(StandIn(run))
        return self.opened[-1]


@pytest.fixture
def home(tmp_path: object) -> Home:
    home = Home(tmp_path)  # type: ignore[arg-type]
    set_current_run(home, "toy-run")
    return home


@pytest.fixture
def deployment() -> Deployment:
    return Deployment(StandIn())


@pytest.fixture
def opener() -> Opener:
    return Opener()


@pytest.fixture
def follower(home: Home, deployment: Deployment, opener: Opener) -> Iterator[HomeFollower]:
    follower = HomeFollower(home, "embedded", deployment, opener, interval_s=0.02, retry_s=0.06)
    yield follower
    follower.stop()


def serving(deployment: Deployment) -> str:
    return deployment.ranker().manifest.run


def test_another_run_takes_over_when_it_is_warm(
    home: Home, deployment: Deployment, opener: Opener, follower: HomeFollower
) -> None:
    follower.look()
    assert opener.opened == []
    before = deployment.ranker()
    set_current_run(home, "other-run")
    follower.look()
    assert serving(deployment) == "other-run"
    assert [one.is_warm for one in opener.opened] == [True]
    assert before.manifest.run == "toy-run"  # who holds it goes on with it
    follower.look()
    assert len(opener.opened) == 1


def test_new_data_brings_the_same_run_anew_when_it_stands_still(
    home: Home, deployment: Deployment, opener: Opener, follower: HomeFollower
) -> None:
    home.manifest.parent.mkdir()
    for path in (home.manifest, home.materialized("embedded")):
        before = deployment.ranker()
        path.write_text("{}", encoding="utf-8")
        follower.look()
        assert deployment.ranker() is before  # something may still be writing
        follower.look()
        assert deployment.ranker() is not before
        assert serving(deployment) == "toy-run"
        follower.look()
    assert len(opener.opened) == 2
    home.materialized("production").write_text("{}", encoding="utf-8")
    for _ in range(3):
        follower.look()
    assert len(opener.opened) == 2


def test_a_run_that_is_asked_for_stays_and_gets_new_data(
    home: Home, deployment: Deployment, opener: Opener
) -> None:
    follower = HomeFollower(home, "embedded", deployment, opener, run="toy-run")
    set_current_run(home, "other-run")
    home.manifest.parent.mkdir()
    home.manifest.write_text("{}", encoding="utf-8")
    for _ in range(3):
        follower.look()
    assert [one.manifest.run for one in opener.opened] == ["toy-run"]
    follower.stop()


def test_a_run_that_cannot_be_loaded_changes_nothing_and_is_said(
    home: Home,
    deployment: Deployment,
    opener: Opener,
    follower: HomeFollower,
    caplog: pytest.LogCaptureFixture,
) -> None:
    set_current_run(home, "broken-run")
    follower.look()
    assert serving(deployment) == "toy-run"
    sentence = (
        "run broken-run cannot be served, toy-run still is: broken-run has no program: train again"
    )
    assert deployment.problem == sentence
    assert sentence in caplog.text
    # It is not tried at every look, but after a while, and then it is served.
    opener.mended = True
    looks = 0
    while serving(deployment) == "toy-run":
        follower.look()
        looks += 1
    assert looks == 3  # retry_s / interval_s
    assert deployment.problem is None


def test_going_back_to_the_run_that_serves_mends_it(
    home: Home, deployment: Deployment, follower: HomeFollower
) -> None:
    set_current_run(home, "broken-run")
    follower.look()
    set_current_run(home, "toy-run")
    follower.look()
    assert deployment.problem is None


def test_a_defect_in_loading_does_not_end_the_following(
    home: Home,
    deployment: Deployment,
    follower: HomeFollower,
    caplog: pytest.LogCaptureFixture,
) -> None:
    set_current_run(home, "defect-run")
    follower.look()
    assert "unexpected KeyError, see the log" in str(deployment.problem)
    assert any(record.exc_info for record in caplog.records)
    set_current_run(home, "other-run")
    follower.look()
    assert serving(deployment) == "other-run"


def test_without_a_ranker_it_is_tried_more_often_and_serves_as_soon_as_it_can(
    home: Home, opener: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    deployment = Deployment(None)
    with pytest.raises(NotLoadedError, match="no model is loaded yet"):
        deployment.ranker()
    set_current_run(home, "broken-run")
    follower = HomeFollower(
        home, "embedded", deployment, opener, interval_s=1, retry_s=60, waiting_retry_s=2
    )
    deployment.keep("broken-run", "the store is away")
    follower.look()
    sentence = "run broken-run cannot be served yet: broken-run has no program: train again"
    with pytest.raises(NotLoadedError) as caught:
        deployment.ranker()
    assert str(caught.value) == sentence
    assert (deployment.problem, deployment.run) == (sentence, None)
    opener.mended = True
    follower.look()
    assert deployment.run is None  # one look of two
    with caplog.at_level(logging.WARNING):
        follower.look()
    assert serving(deployment) == deployment.run == "broken-run"
    assert deployment.problem is None
    assert "run broken-run serves now, in place of none" in caplog.text
    follower.stop()


@pytest.mark.parametrize("content", ["", "{", '{"run": 5}'])
def test_a_broken_file_changes_nothing(
    home: Home, deployment: Deployment, follower: HomeFollower, content: str
) -> None:
    home.current_run.write_text(content)
    follower.look()
    assert serving(deployment) == "toy-run"
    assert "current.json" in str(deployment.problem)
    home.current_run.unlink()
    follower.wake()
    follower.look()
    assert serving(deployment) == "toy-run"


def test_swaps_under_load_fail_no_request(
    home: Home, deployment: Deployment, follower: HomeFollower
) -> None:
    follower.start()
    answers: list[tuple[int, str]] = []
    stop = threading.Event()
    app = create_app(deployment, directory=toy_directory())
    with TestClient(app, raise_server_exceptions=False) as client:

        def ask() -> None:
            while not stop.is_set():
                response = client.post("/v1/rank", json={"user_id": "ann"})
                answers.append((response.status_code, json.loads(response.text).get("model")))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for run in ("toy-run", "run-1", "broken-run", "run-2"):
            set_current_run(home, run)
            if run == "broken-run":
                wait_until(lambda: deployment.problem is not None)
            else:
                wait_until(lambda run=run: (200, run) in answers[-3:])  # type: ignore[misc]
        stop.set()
        for thread in threads:
            thread.join()
    assert {status for status, _ in answers} == {200}
    assert {model for _, model in answers} == {"toy-run", "run-1", "run-2"}


def test_being_woken_it_looks_at_once(home: Home, deployment: Deployment, opener: Opener) -> None:
    follower = HomeFollower(home, "embedded", deployment, opener, interval_s=3600)
    follower.start()
    try:
        set_current_run(home, "other-run")
        follower.wake()
        wait_until(lambda: serving(deployment) == "other-run")
    finally:
        follower.stop()


def test_a_swap_is_in_the_log(deployment: Deployment, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        deployment.swap(StandIn("other-run"))
    assert "run other-run serves now, in place of toy-run" in caplog.text
