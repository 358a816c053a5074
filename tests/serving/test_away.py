"""The command with real servers that are away: when it starts, and when its workers die."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi.testclient import TestClient

from feature_repo.artifact import PROGRAM_FILE, load_run_manifest
from feature_repo.connections import DATABASE_URL
from feature_repo.home import Home
from feature_repo.services.processes import free_port
from feature_repo.services.redis import RedisServer
from serving.opening import ServiceOptions, open_service
from tests.live_home import RUN, live_home
from tests.live_service import LiveService, running, wait_until
from tests.servers import running_redis
from tests.serving.test_opening import write_program

ANSWER_S = 20
"""Most seconds until somebody answers where all workers have just died; far less than a hang."""


@pytest.fixture(scope="module")
def redis_server(_ends_in_order: None) -> Iterator[RedisServer]:
    """A Redis of this file's own, which it stops and starts."""
    with running_redis() as server:
        yield server


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Home]:
    with live_home(tmp_path_factory.mktemp("away"), "production", request) as home:
        write_program(home)
        yield home


def get(service: LiveService, path: str) -> httpx.Response:
    return httpx.get(service.url + path, timeout=ANSWER_S)


def post(service: LiveService, path: str, body: object) -> httpx.Response:
    return httpx.post(service.url + path, json=body, timeout=ANSWER_S)


def kill_workers(service: LiveService) -> None:
    """All at once, so that nobody but those in their places can answer."""
    killed = service.workers()
    assert len(killed) == 2
    for worker in killed:
        worker.kill()


def wait_until_all(service: LiveService, status: int) -> None:
    """Until /readyz has this status many times in a row, each time over a new connection."""

    def is_so() -> bool:
        return len(service.workers()) == 2 and all(
            get(service, "/readyz").status_code == status for _ in range(8)
        )

    wait_until(is_so, f"/readyz {status}")


@pytest.mark.timeout(300)
def test_it_answers_while_redis_is_away_and_ranks_when_it_is_back(
    home: Home, redis_server: RedisServer, tmp_path: Path
) -> None:
    scene = load_run_manifest(home, RUN).scenes[0]
    event = {"event_id": "1", "user_id": "newcomer", "scene": scene, "text": "word1 word2"}
    rank = {"user_id": "newcomer", "top_k": 1}
    redis_server.stop()
    try:
        with running(home, tmp_path) as service:
            assert service.announced["run"] == RUN

            def assert_it_says_why(why: str) -> None:
                assert get(service, "/healthz").status_code == 200
                ready = get(service, "/readyz")
                assert ready.status_code == 503
                assert ready.json()["run"] is None
                assert f"run {RUN} cannot be served yet: " in ready.json()["detail"]
                assert why in ready.json()["detail"]
                for answer in (
                    post(service, "/v1/rank", rank),
                    post(service, "/v1/events", {"events": [event]}),
                ):
                    assert answer.status_code == 503
                    assert why in answer.json()["detail"]
                    assert int(answer.headers["retry-after"]) > 0

            assert_it_says_why("Redis at 127.0.0.1")
            kill_workers(service)
            assert_it_says_why("Redis at 127.0.0.1")

            redis_server.start()
            wait_until_all(service, 200)

            # Whoever meets the worker that loads last asks again, as its 503 says.
            def answer_to(path: str, body: dict[str, Any]) -> dict[str, Any]:
                answers: list[httpx.Response] = []

                def is_answered() -> bool:
                    answers.append(post(service, path, body))
                    return answers[-1].status_code != 503

                wait_until(is_answered, f"an answer to {path}")
                found: dict[str, Any] = answers[-1].json()
                return found

            assert answer_to("/v1/rank", rank)["known"] is False
            assert answer_to("/v1/events", {"events": [event]})["accepted"] == 1
            assert {answer_to("/v1/rank", rank)["known"] for _ in range(8)} == {True}

            # What keeps a worker from loading may be anything once the service has answered.
            program = home.runs / RUN / PROGRAM_FILE
            hidden = program.rename(program.with_suffix(".hidden"))
            kill_workers(service)
            assert_it_says_why(PROGRAM_FILE)
            hidden.rename(program)
            wait_until_all(service, 200)

            service.stop()
    finally:
        redis_server.start()
    said = service.said()
    assert "Traceback" not in said
    assert f"run {RUN} serves now, in place of none" in said


def test_it_answers_while_postgresql_is_away(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    address = urlsplit(os.environ[DATABASE_URL])
    closed = address._replace(netloc=address.netloc.replace(f":{address.port}", f":{free_port()}"))
    monkeypatch.setenv(DATABASE_URL, closed.geturl())
    opened = open_service(home, "production", ServiceOptions())
    try:
        with TestClient(opened.app, raise_server_exceptions=False) as client:
            assert client.get("/healthz").status_code == 200
            ready = client.get("/readyz")
            assert ready.status_code == 503
            assert "the registry of the profile 'production'" in ready.json()["detail"]
            answer = client.post("/v1/rank", json={"user_id": "u1"})
            assert answer.status_code == 503
            assert answer.json() == {"detail": ready.json()["detail"]}
    finally:
        opened.close()
