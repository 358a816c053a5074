"""The server as a process, alone and with workers: stops, kills and swaps under load."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import IO, Any

import httpx
import psutil
import pytest
from fastapi import FastAPI

from feature_repo.artifact import set_current_run
from feature_repo.errors import LongtrailError
from feature_repo.home import PROJECT_ROOT, Home
from serving.security import new_key
from serving.server import OpenedApp, run_server
from tests import waiting
from tests.serving.conftest import toy_manifest, write_run
from tests.serving.toy_server import Options

TIMEOUT_S = 120
wait_until = partial(waiting.wait_until, most_s=TIMEOUT_S, poll_s=0.05)


class Running:
    """A server that answers."""

    def __init__(self, process: subprocess.Popen[str], key: str) -> None:
        self.process = process
        self.key = key
        line = pipe(process.stdout).readline()
        assert line, pipe(process.stderr).read()
        announced = json.loads(line)
        assert announced["run"] == "toy-run"
        self.url = announced["url"]

    def rank(self, user_id: str = "ann", *, key: str | None = None) -> httpx.Response:
        """Over a new connection each time, so that any worker may answer."""
        body = {"user_id": user_id, "top_k": 1}
        headers = {"x-api-key": self.key if key is None else key}
        return httpx.post(f"{self.url}/v1/rank", json=body, headers=headers, timeout=TIMEOUT_S)

    def workers(self) -> set[int]:
        return {one.pid for one in psutil.Process(self.process.pid).children()}

    def stop(self) -> tuple[str, str]:
        """Ask it to stop; what it wrote after its address, and to stderr."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.communicate(timeout=TIMEOUT_S)


def start(options: Options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.serving.toy_server", json.dumps(asdict(options))],
        cwd=PROJECT_ROOT,
        env=os.environ | {"PYTHONPATH": str(PROJECT_ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


@dataclass(frozen=True)
class Begun:
    """A home, and the process that is about to serve it."""

    home: Home
    process: subprocess.Popen[str]


@pytest.fixture(scope="module")
def begun(
    tmp_path_factory: pytest.TempPathFactory, toy_program: bytes
) -> Iterator[tuple[Begun, Begun]]:
    """One server alone and one with workers, begun at once: they import for seconds."""

    def begin(**options: Any) -> Begun:
        home = Home(tmp_path_factory.mktemp("server"))
        write_run(home, toy_program)
        write_keys(home, REVOKED, KEPT)
        return Begun(home, start(Options(str(home.root), **options)))

    alone = begin(delay_s=2.0)
    with_workers = begin(workers=2, log_format="json", asks_for_keys=True)
    yield alone, with_workers
    for one in (alone, with_workers):
        one.process.kill()
        one.process.communicate()


KEPT, REVOKED = new_key("kept", ["read"]), new_key("revoked", ["read"])


def write_keys(home: Home, *keys: tuple[str, str]) -> None:
    (home.root / "keys.toml").write_text("".join(entry for _, entry in keys), encoding="utf-8")


@contextmanager
def running(process: subprocess.Popen[str], key: str = "") -> Iterator[Running]:
    """Killed if a test leaves it behind; it also stops when this process ends."""
    watchdog = threading.Timer(TIMEOUT_S, process.kill)
    watchdog.start()
    try:
        yield Running(process, key)
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


@contextmanager
def load(server: Running, num_threads: int = 2) -> Iterator[list[httpx.Response | Exception]]:
    """Requests one after the other in each thread, for as long as the block runs."""
    answers: list[httpx.Response | Exception] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                answers.append(server.rank())
            except httpx.HTTPError as error:
                answers.append(error)
            time.sleep(0.01)  # leaves the processor to whoever loads a model

    threads = [threading.Thread(target=ask) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def num_connections(process_id: int) -> int:
    """Connections that callers keep open to a process' own port."""
    all_of_it = psutil.Process(process_id).net_connections("tcp")
    return sum(one.status == psutil.CONN_ESTABLISHED for one in all_of_it)


def statuses(answers: list[httpx.Response | Exception]) -> Counter[str]:
    return Counter(
        str(one.status_code) if isinstance(one, httpx.Response) else repr(one) for one in answers
    )


def test_answers_swaps_under_load_and_lets_the_running_request_end(
    begun: tuple[Begun, Begun], toy_program: bytes
) -> None:
    home = begun[0].home
    other = home.runs / "other-run"
    other.mkdir()
    toy_manifest(run="other-run").save(other / "manifest.json")
    (other / "score.pt2").write_bytes(toy_program)
    with running(begun[0].process) as server:
        assert httpx.get(f"{server.url}/healthz").json()["status"] == "ok"
        assert server.rank().json()["ranked"][0]["item_id"] == "L1"
        assert httpx.post(f"{server.url}/v1/rank", json={"top_k": 1}).status_code == 422

        with load(server) as answers:
            wait_until(lambda: len(answers) > 5, "an answer")
            set_current_run(home, "other-run")
            wait_until(
                lambda: any(
                    isinstance(one, httpx.Response) and one.json().get("model") == "other-run"
                    for one in answers[-5:]
                ),
                "the other run's answer",
            )
        assert set(statuses(answers)) == {"200"}
        models = [one.json()["model"] for one in answers if isinstance(one, httpx.Response)]
        assert set(models) == {"toy-run", "other-run"}

        late: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: late.append(server.rank("slow")))
        asking.start()
        wait_until(  # itself counts
            lambda: "longtrail_requests_in_flight 2.0" in httpx.get(f"{server.url}/metrics").text,
            "a request that is being answered",
        )
        out, err = server.stop()
        asking.join()
        assert [response.status_code for response in late] == [200]
        assert late[0].json()["known"] is False
        assert server.process.returncode == 0
        assert out == ""  # stdout is data: requests are logged on stderr
        assert "POST /v1/rank 200" in err
        assert "other-run serves now, in place of toy-run" in err
        assert "Traceback" not in err
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/healthz")


def test_workers_share_the_load_and_a_killed_one_is_replaced(
    begun: tuple[Begun, Begun],
) -> None:
    home = begun[1].home
    with running(begun[1].process, KEPT[0]) as server:
        first = server.workers()
        assert len(first) == 2
        for _ in range(20):
            assert server.rank().status_code == 200
        with contextlib.ExitStack() as kept:
            for _ in range(8):
                client = kept.enter_context(httpx.Client())
                assert client.get(f"{server.url}/healthz").status_code == 200
            held = [num_connections(process_id) for process_id in first]
            assert sum(held) >= 8
            assert max(held) - min(held) <= 2
        # Whoever is asked tells of both workers.
        counted = 'longtrail_requests_total{method="POST",route="/v1/rank",status="200"} 20.0'
        for _ in range(4):
            assert counted in httpx.get(f"{server.url}/metrics").text

        # A key is revoked; then someone breaks the file, which changes nothing.
        assert server.rank(key=REVOKED[0]).status_code == 200
        write_keys(home, KEPT)
        server.process.send_signal(signal.SIGHUP)
        wait_until(
            lambda: {server.rank(key=REVOKED[0]).status_code for _ in range(10)} == {401},
            "the end of the key",
        )
        write_keys(home, ("", "nonsense"))

        killed = min(first)
        with load(server) as answers:
            os.kill(killed, signal.SIGKILL)
            wait_until(lambda: len(server.workers() - {killed}) == 2, "a worker in its place")
            wait_until(lambda: len(answers) > 20, "answers of the other one")
        # What the killed one was answering is lost, at most one per thread; nothing else is.
        failed = sum(number for status, number in statuses(answers).items() if status != "200")
        assert failed <= 2, statuses(answers)

        workers = server.workers()
        assert {server.rank(key=REVOKED[0]).status_code for _ in range(20)} == {401}
        assert {server.rank().status_code for _ in range(20)} == {200}
        out, err = server.stop()
        assert server.process.returncode == 0
        assert out == ""
        assert not [pid for pid in workers if psutil.pid_exists(pid)]
        lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
        ended = f"worker {killed} ended (exit code -9)"
        assert any(str(line["message"]).startswith(ended) for line in lines)
        access = [line for line in lines if line.get("route") == "/v1/rank"]
        assert {line["status"] for line in access} == {200}  # those without a key have no route
        assert "Traceback" not in err


def test_an_application_that_cannot_be_opened_is_one_sentence() -> None:
    def broken(_: bool) -> OpenedApp:
        raise LongtrailError("the toy is broken: mend it")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(LongtrailError, match="the toy is broken: mend it"):
        run_server(broken, host="127.0.0.1", port=0, announce=lambda *_: None)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_changed_while_it_was_opened_is_known_before_it_answers() -> None:
    done: list[str] = []

    def announce(_: str, run: str) -> None:
        done.append(f"announced {run}")
        signal.raise_signal(signal.SIGTERM)

    opened = OpenedApp(
        FastAPI(), "toy-run", lambda: done.append("refreshed"), lambda: done.append("closed")
    )
    run_server(lambda _: opened, host="127.0.0.1", port=0, announce=announce)
    assert done == ["refreshed", "announced toy-run", "closed"]


def never(_: bool) -> OpenedApp:
    pytest.fail("the model was loaded before the port was known to be free")


def test_a_taken_port_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LongtrailError) as caught:
            run_server(never, host="127.0.0.1", port=port, announce=lambda *_: None)
    assert str(caught.value) == (
        f"cannot listen on 127.0.0.1 port {port} (Address already in use): choose another with "
        "--host and --port"
    )


def test_an_address_that_is_not_ours_is_one_sentence() -> None:
    address = "192.0.2.1"  # of the range that is kept for documentation
    with pytest.raises(LongtrailError, match=rf"cannot listen on {address} port 0 \(.+\): choose"):
        run_server(never, host=address, port=0, announce=lambda *_: None)
