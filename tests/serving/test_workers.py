import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import IO

import psutil
import pytest

from feature_repo.home import PROJECT_ROOT
from tests import waiting
from tests.serving.toy_workers import MIN_LIFE_S

TIMEOUT_S = 60
wait_until = partial(waiting.wait_until, most_s=TIMEOUT_S)


@contextmanager
def toy(what: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.serving.toy_workers", what],
        cwd=PROJECT_ROOT,
        env=os.environ | {"PYTHONPATH": str(PROJECT_ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(TIMEOUT_S, process.kill)
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def workers_of(process: subprocess.Popen[str]) -> set[int]:
    return {one.pid for one in psutil.Process(process.pid).children()}


def test_all_answer_before_it_is_told_and_all_end_when_asked() -> None:
    with toy("answer") as process:
        assert pipe(process.stdout).readline() == "toy-run\n"
        workers = workers_of(process)
        assert len(workers) == 2
        process.send_signal(signal.SIGHUP)
        lines = sorted(pipe(process.stderr).readline() for _ in range(3))
        assert lines == ["changed\n", "looked\n", "looked\n"]
        process.send_signal(signal.SIGTERM)
        assert pipe(process.stdout).read() == ""
        # The parent lets go of its socket before the workers do.
        first, *rest = pipe(process.stderr)
        assert first == "stops\n"
        gone = [f"gone {one}\n" for one in workers]
        assert sorted(rest) == sorted([*gone, "stopped\n", "stopped\n"])
        assert process.wait(TIMEOUT_S) == 0


def test_a_killed_worker_is_replaced_but_not_in_a_busy_loop() -> None:
    with toy("answer") as process:
        pipe(process.stdout).readline()
        first = workers_of(process)
        process.send_signal(signal.SIGHUP)
        killed = min(first)
        began = time.monotonic()
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: len(workers_of(process) - {killed}) == 2, "another worker")
        assert time.monotonic() - began > MIN_LIFE_S / 2  # it had lived for less than that
        assert first - {killed} < workers_of(process)
        # The worker in its place begins with what the parent heard of meanwhile.
        lines = [pipe(process.stderr).readline()]
        while "knows" not in lines[-1]:
            assert lines[-1]
            lines.append(pipe(process.stderr).readline())
        assert lines.count("replaces\n") == 1  # and of no other worker


def test_workers_stop_when_their_parent_is_killed() -> None:
    with toy("answer") as process:
        pipe(process.stdout).readline()
        workers = workers_of(process)
        process.kill()
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in workers), "their end")


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("refuse", "Error: there is no model: train one"),
        ("die", "Error: a worker ended before it could answer (exit code 7): its last lines"),
        ("break", "Error: a worker ended before it could answer (exit code 1): its last lines"),
    ],
)
def test_a_worker_that_cannot_start_ends_it_with_a_sentence(what: str, sentence: str) -> None:
    with toy(what) as process:
        assert pipe(process.stdout).read() == ""
        err = pipe(process.stderr).read()
        assert process.wait(TIMEOUT_S) == 1
    errors = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(sentence)
    assert ("RuntimeError: a defect" in err) == (what == "break")
