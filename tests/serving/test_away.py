"""The command with real servers that are away: when it starts, and when its workers die."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from fastapi.testclient import TestClient

from feature_repo.artifact import PROGRAM_FILE, load_run_manifest
from feature_repo.connections import DATABASE_URL
from feature_repo.home import PROJECT_ROOT, Home
from feature_repo.services.processes import free_port
from feature_repo.services.redis import RedisServer
from serving.opening import ServiceOptions, open_service
from tests.live_home import RUN, live_home
from tests.servers import running_redis
from tests.serving.test_opening import write_program

TIMEOUT_S = 120
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


class Service:
    """`longtrail serve` with two workers."""

    def __init__(self, process: subprocess.Popen[str], announced: str) -> None:
        self.process = process
        self.announced = json.loads(announced)
        self.url = self.announced["url"]

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=ANSWER_S)

    def post(self, path: str, body: object) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=ANSWER_S)

    def workers(self) -> set[int]:
        return {one.pid for one in psutil.Process(self.process.pid).children()}

    def kill_workers(self) -> None:
        """All at once, so that nobody but those in their places can answer."""
        killed = self.workers()
        assert len(killed) == 2
        for process_id in killed:
            os.kill(process_id, signal.SIGKILL)

    def wait_until_all(self, status: int) -> None:
        """Until /readyz has this status many times in a row, each time over a new connection."""

        def is_so() -> bool:
            return all(self.get("/readyz").status_code == status for _ in range(8))

        wait_until(lambda: len(self.workers()) == 2 and is_so())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


@contextmanager
def serving(home: Home, log: Path) -> Iterator[Service]:
    command = [
        *(sys.executable, "-m", "longtrail", "--home", str(home.root), "--profile", "production"),
        *("serve", "--port", "0", "--workers", "2", "--no-access-log"),
    ]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=PROJECT_ROOT
        )
    watchdog = threading.Timer(TIMEOUT_S, process.kill)
    watchdog.start()
    try:
        line = pipe(process.stdout).readline()
        assert line, log.read_text()
        yield Service(process, line)
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


@pytest.mark.timeout(300)
def test_it_answers_while_redis_is_away_and_ranks_when_it_is_back(
    home: Home, redis_server: RedisServer, tmp_path: Path
) -> None:
    scene = load_run_manifest(home, RUN).scenes[0]
    event = {"event_id": "1", "user_id": "newcomer", "scene": scene, "text": "word1 word2"}
    rank = {"user_id": "newcomer", "top_k": 1}
    log = tmp_path / "log"
    redis_server.stop()
    try:
        with serving(home, log) as service:
            assert service.announced["run"] == RUN

            def assert_it_says_why(why: str) -> None:
                assert service.get("/healthz").status_code == 200
                ready = service.get("/readyz")
                assert ready.status_code == 503
                assert ready.json()["run"] is None
                assert f"run {RUN} cannot be served yet: " in ready.json()["detail"]
                assert why in ready.json()["detail"]
                for answer in (
                    service.post("/v1/rank", rank),
                    service.post("/v1/events", {"events": [event]}),
                ):
                    assert answer.status_code == 503
                    assert why in answer.json()["detail"]
                    assert int(answer.headers["retry-after"]) > 0

            assert_it_says_why("Redis at 127.0.0.1")
            service.kill_workers()
            assert_it_says_why("Redis at 127.0.0.1")

            redis_server.start()
            service.wait_until_all(200)
            assert service.post("/v1/rank", rank).json()["known"] is False
            assert service.post("/v1/events", {"events": [event]}).json()["accepted"] == 1
            assert {service.post("/v1/rank", rank).json()["known"] for _ in range(8)} == {True}

            # What keeps a worker from loading may be anything once the service has answered.
            program = home.runs / RUN / PROGRAM_FILE
            hidden = program.rename(program.with_suffix(".hidden"))
            service.kill_workers()
            assert_it_says_why(PROGRAM_FILE)
            hidden.rename(program)
            service.wait_until_all(200)

            service.process.send_signal(signal.SIGTERM)
            assert service.process.wait(TIMEOUT_S) == 0
    finally:
        redis_server.start()
    said = log.read_text()
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
