"""The real service as a process of its own: `longtrail serve` with two workers."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil

from feature_repo.home import PROJECT_ROOT, Home
from feature_repo.services.processes import free_port
from tests import waiting

PATIENCE_S = 120.0
"""What takes longer hangs."""
wait_until = partial(waiting.wait_until, most_s=PATIENCE_S)


class LiveService:
    """``longtrail serve`` with two workers, always on the same port.

    Args:
        home: Whose production stores it serves from.
        logs: Folder for what its processes say.
        options: Further ones of the command.
        variables: Its environment beside what Python needs; None for this process' own.
    """

    def __init__(
        self, home: Home, logs: Path, *options: str, variables: Mapping[str, str] | None = None
    ) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.announced: dict[str, str] = {}
        """What it printed when it was started last."""
        self.log = logs / f"serve-{port}.err"
        self._command = [
            *(sys.executable, "-m", "longtrail", "--home", str(home.root)),
            *("--profile", "production", "serve", "--workers", "2", "--port", str(port)),
            *("--no-access-log", *options),
        ]
        self._variables = {
            **(os.environ if variables is None else variables),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(PROJECT_ROOT),
            "OMP_NUM_THREADS": "1",
        }
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it and wait until every worker answers."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                self._command, cwd=PROJECT_ROOT, env=self._variables, text=True,
                stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        watchdog = threading.Timer(PATIENCE_S, self.kill)
        watchdog.start()
        try:
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        assert line, self.said()
        self.announced = json.loads(line)
        assert self.announced["url"] == self.url

    def workers(self) -> list[psutil.Process]:
        """The processes that answer now."""
        assert self._process is not None
        return psutil.Process(self._process.pid).children()

    def kill(self) -> None:
        """End all of its processes with SIGKILL; nothing where it does not run."""
        if self._process is None or self._process.poll() is not None:
            return
        workers = self.workers()
        self._process.kill()
        for worker in workers:
            worker.kill()
        psutil.wait_procs(workers, timeout=PATIENCE_S)
        self._process.communicate()

    def stop(self) -> None:
        """Ask it to stop, and wait for its end."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        self._process.communicate(timeout=PATIENCE_S)
        assert self._process.returncode == 0, self.said()

    def said(self) -> str:
        """What all its processes logged."""
        return self.log.read_text(encoding="utf-8", errors="replace")


@contextmanager
def running(
    home: Home, logs: Path, *options: str, variables: Mapping[str, str] | None = None
) -> Iterator[LiveService]:
    """A :class:`LiveService` that answers, killed at the end where it still runs."""
    service = LiveService(home, logs, *options, variables=variables)
    try:
        service.start()
        yield service
    finally:
        service.kill()
