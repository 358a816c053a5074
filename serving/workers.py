"""Several processes on one listening socket: each a whole server, none of them missed for long.

The parent has imported everything and opened nothing, so that a fork is cheap and safe; it only
watches. A worker that dies is replaced, one that cannot start ends the service with its sentence
unless it takes another's place, and workers whose parent is gone stop by themselves.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType

from feature_repo.errors import LongtrailError

STOP_TIMEOUT_S = 10
"""Seconds that running requests have to end when a server is asked to stop."""
MIN_LIFE_S = 5.0
"""Seconds; no busy loop of what cannot live."""
_TICK_S = 0.2
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_log = logging.getLogger(__name__)


@dataclass
class _Worker:
    """A process, and what it says of itself.

    Args:
        process_id: Of the process.
        place: Which of the workers it is, from 0; another in its place has the same.
        reports: Where it tells, in one JSON line, the run that it serves or why it cannot.
        started: By the monotonic clock.
        run: Set once it answers.
        error: Why it cannot.
    """

    process_id: int
    place: int
    reports: int
    started: float = field(default_factory=time.monotonic)
    run: str | None = None
    error: str | None = None


class Workers:
    """Keeps a number of worker processes running.

    Args:
        serve: Serves in a worker, on a socket that was opened before: is given the worker's place,
            whether another was in it before, and what to call with the name of the run once
            requests are answered; returns when asked to stop. Callers wait for one that takes
            another's place, so it should come up whatever is missing.
        num_workers: At least 1.
        on_gone: Called with the id of every process that has ended.
        on_hangup: Called after a SIGHUP, in the parent: workers to come begin with what it has.
        on_stop: Called before the workers are told to stop.
        min_life_s: A worker that dies sooner is replaced only after as long, at least 0.
    """

    def __init__(
        self,
        serve: Callable[[int, bool, Callable[[str], None]], None],
        *,
        num_workers: int,
        on_gone: Callable[[int], None],
        on_hangup: Callable[[], None] = lambda: None,
        on_stop: Callable[[], None] = lambda: None,
        min_life_s: float = MIN_LIFE_S,
    ) -> None:
        self._serve = serve
        self._num_workers = num_workers
        self._on_gone = on_gone
        self._on_hangup = on_hangup
        self._on_stop = on_stop
        self._min_life_s = min_life_s
        self._workers: dict[int, _Worker] = {}
        self._due: list[tuple[float, int]] = []
        self._is_stopping = False
        self._was_hung_up = False
        # Nobody writes to it: a worker reads its end when the parent is gone, however it went.
        self._alive_read, self._alive_write = os.pipe()

    def run(self, announce: Callable[[str], None]) -> None:
        """Serve until SIGTERM or SIGINT; SIGHUP is passed on.

        Args:
            announce: Called with the name of the run once all workers answer.

        Raises:
            LongtrailError: If a worker cannot start.
        """
        previous = {number: signal.signal(number, self._stop) for number in _STOP_SIGNALS}
        previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._pass_on)
        try:
            for place in range(self._num_workers):
                self._start(place, is_replacement=False)
            run = self._await_all()
            if run is not None:
                announce(run)
            while not self._is_stopping:
                for worker, code in self._ended():
                    self._schedule(worker, code)
                self._look()
                self._replace()
                time.sleep(_TICK_S)
        finally:
            self._end()
            for number, handler in previous.items():
                signal.signal(number, handler)
            os.close(self._alive_read)
            os.close(self._alive_write)

    def _stop(self, _signal: int, _frame: FrameType | None) -> None:
        self._is_stopping = True

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        self._was_hung_up = True  # what the parent does then, it may not do in a signal's handler
        self._send(number)

    def _look(self) -> None:
        if self._was_hung_up:
            self._was_hung_up = False
            self._on_hangup()

    def _send(self, number: int) -> None:
        for process_id in tuple(self._workers):
            with suppress(ProcessLookupError):
                os.kill(process_id, number)

    def _start(self, place: int, *, is_replacement: bool) -> None:
        reports, tell = os.pipe()
        sys.stdout.flush()  # or a worker would write what waits once more
        sys.stderr.flush()
        process_id = os.fork()
        if process_id:
            os.close(tell)
            os.set_blocking(reports, False)
            self._workers[process_id] = _Worker(process_id, place, reports)
            return
        # From here on this is the worker; it never returns into the parent's code.
        os.close(reports)
        os.close(self._alive_write)
        code = 1
        try:
            code = self._work(place, tell, is_replacement=is_replacement)
        finally:
            if code and (error := sys.exc_info())[0] is not None:
                sys.excepthook(*error)
            sys.stderr.flush()
            os._exit(code)

    def _work(self, place: int, tell: int, *, is_replacement: bool) -> int:
        """Serve in the worker; returns its exit code."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # Ctrl-C reaches all processes of a terminal; what it means is for the parent to say.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        threading.Thread(target=self._follow_parent, name="parent", daemon=True).start()

        def report(**what: str) -> None:
            os.write(tell, json.dumps(what).encode() + b"\n")

        try:
            self._serve(place, is_replacement, lambda run: report(run=run))
        except LongtrailError as error:
            report(error=str(error))
            return 1
        return 0

    def _follow_parent(self) -> None:
        os.read(self._alive_read, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    def _await_all(self) -> str | None:
        """Wait until every worker answers; the name of the run, or None if asked to stop.

        Raises:
            LongtrailError: If one cannot.
        """
        while not self._is_stopping:
            for worker, code in self._ended():
                raise LongtrailError(
                    worker.error
                    or f"a worker ended before it could answer (exit code {code}): its last lines "
                    "above say why"
                )
            runs = [worker.run for worker in self._workers.values()]
            if all(runs):
                return runs[0]
            time.sleep(_TICK_S)
        return None

    def _ended(self) -> list[tuple[_Worker, int]]:
        """Hear what the workers say; those that ended since the last time, with their exit codes.

        Those that ended by a signal have its number, negative.
        """
        self._hear()
        ended = []
        for process_id in tuple(self._workers):
            gone, status = os.waitpid(process_id, os.WNOHANG)
            if gone:
                self._hear()  # its last words came after the first look
                ended.append((self._forget(process_id), os.waitstatus_to_exitcode(status)))
        return ended

    def _hear(self) -> None:
        for worker in self._workers.values():
            with suppress(BlockingIOError):
                for line in os.read(worker.reports, 65_536).splitlines():
                    said = json.loads(line)
                    worker.run, worker.error = said.get("run"), said.get("error")

    def _schedule(self, worker: _Worker, code: int) -> None:
        """Plan for another in the place of a worker that ended."""
        now = time.monotonic()
        wait_s = max(0.0, worker.started + self._min_life_s - now)
        _log.error(
            "worker %d ended (exit code %d%s): another takes its place %s",
            *(worker.process_id, code, f", {worker.error}" if worker.error else ""),
            f"in {wait_s:.0f} s" if wait_s else "now",
        )
        self._due.append((now + wait_s, worker.place))

    def _replace(self) -> None:
        now = time.monotonic()
        due = [place for moment, place in self._due if moment <= now]
        self._due = [(moment, place) for moment, place in self._due if moment > now]
        for place in due:
            self._start(place, is_replacement=True)

    def _forget(self, process_id: int) -> _Worker:
        worker = self._workers.pop(process_id)
        os.close(worker.reports)
        self._on_gone(process_id)
        return worker

    def _end(self) -> None:
        """Let the running requests of all workers end; what does not is killed."""
        self._is_stopping = True
        self._on_stop()
        self._send(signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S + 5
        while self._workers:
            if time.monotonic() > deadline:
                self._send(signal.SIGKILL)
            self._ended()
            time.sleep(_TICK_S / 4)
