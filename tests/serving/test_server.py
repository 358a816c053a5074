import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import httpx
import pytest

from feature_repo.errors import LongtrailError
from feature_repo.home import PROJECT_ROOT
from serving.ranker import Ranker
from serving.server import is_loopback, run_server
from tests.serving.conftest import World

START_TIMEOUT_S = 60


def start(world: World, *, delay_s: float = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.serving.toy_server"),
            *(str(world.home.root), "127.0.0.1", "0", str(delay_s)),
        ],
        cwd=PROJECT_ROOT,
        env=os.environ | {"PYTHONPATH": str(PROJECT_ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


@contextmanager
def running(world: World, *, delay_s: float = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server that answers, with its address; killed if a test leaves it behind."""
    process = start(world, delay_s=delay_s)
    watchdog = threading.Timer(START_TIMEOUT_S, process.kill)
    watchdog.start()
    try:
        line = pipe(process.stdout).readline()
        assert line, pipe(process.stderr).read()
        announced = json.loads(line)
        assert announced["run"] == "toy-run"
        yield process, announced["url"]
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def test_answers_then_lets_the_running_request_end(world: World) -> None:
    with running(world, delay_s=1.0) as (process, url):
        assert httpx.get(f"{url}/healthz").json()["status"] == "ok"
        response = httpx.post(f"{url}/v1/rank", json={"user_id": "ann", "top_k": 1})
        assert response.json()["ranked"][0]["item_id"] == "L1"
        assert httpx.post(f"{url}/v1/rank", json={"top_k": 1}).status_code == 422

        late: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: late.append(httpx.post(f"{url}/v1/rank", json={"user_id": "slow"}))
        )
        asking.start()
        time.sleep(0.3)  # the request is being answered, for another 0.7 s
        process.send_signal(signal.SIGTERM)
        asking.join()
        out, err = process.communicate(timeout=20)
        assert [response.status_code for response in late] == [200]
        assert late[0].json()["known"] is False
        assert process.returncode == 0
        assert out == ""  # stdout is data: requests are logged on stderr
        assert '"POST /v1/rank HTTP/1.1" 200' in err
        assert "Traceback" not in err
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/healthz")


def never() -> Ranker:
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


@pytest.mark.parametrize(
    ("host", "answer"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),  # noqa: S104
        ("::", False),
        ("192.168.1.4", False),
        ("shop.example", False),
    ],
)
def test_loopback(host: str, answer: bool) -> None:
    assert is_loopback(host) is answer
