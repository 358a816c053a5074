"""Commands of ``longtrail`` in processes of their own, which stop at a chosen event of their work.

They are forked (:mod:`tests.forked`), so a command starts in milliseconds and the events are those
of its work, not of imports. An event is a call from or of a
function of Longtrail's, or a change of a file or folder in the home. The number of events before a
stop is counted, not timed: a busy machine stops a command at the same place. While a command is
stopped the test does harm: ends it with SIGKILL, or a server that it uses.
"""

import contextlib
import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from feature_repo.home import PROJECT_ROOT
from tests.forked import PATIENCE_S

Event = Literal["call", "change"]
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


@dataclass(frozen=True)
class Stop:
    """Where a command stops: before its n-th event of a kind, counted from 1."""

    event: Event
    number: int


@dataclass(frozen=True)
class Done:
    """How a command ended.

    Args:
        code: Exit code; minus the signal's number where one ended it.
        stdout: What it printed.
        stderr: What it told people.
        events: Number of its events, by kind; empty where it was killed.
    """

    code: int
    stdout: str
    stderr: str
    events: dict[Event, int] = field(default_factory=dict)

    @property
    def result(self) -> dict[str, Any]:
        """Its one JSON line."""
        assert self.code == 0, self.stderr
        result: dict[str, Any] = json.loads(self.stdout)
        return result

    @property
    def sentence(self) -> str:
        """What a user reads where it failed: one sentence, no traceback."""
        assert self.code == 1, (self.code, self.stdout, self.stderr)
        assert "Traceback" not in self.stderr, self.stderr
        return self.stderr.strip().splitlines()[-1]


class Command:
    """A running command.

    Args:
        arguments: Of ``longtrail``.
        variables: Its whole environment.
        home: Changes of files in it are events.
        folder: Its output goes into files there.
        stop: Where it stops; None = nowhere.
        counted: Events that are counted; calls make a command slower.
        file_size: Largest file it may write, bytes; None = any.
    """

    def __init__(
        self,
        arguments: list[str],
        variables: Mapping[str, str],
        home: Path,
        folder: Path,
        *,
        stop: Stop | None = None,
        counted: Collection[Event] = (),
        file_size: int | None = None,
    ) -> None:
        counted = {*counted, stop.event} if stop else set(counted)
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("*.out")))
        self._outputs = [folder / f"{number}.out", folder / f"{number}.err"]
        for path in self._outputs:
            path.touch()
        context = multiprocessing.get_context("forkserver")
        self._line, theirs = context.Pipe()
        self._process = context.Process(
            target=_run,
            args=(
                arguments,
                dict(variables),
                str(home),
                self._outputs,
                stop,
                counted,
                file_size,
                theirs,
            ),
            daemon=True,
        )
        self._process.start()
        theirs.close()

    def wait_for_stop(self) -> None:
        """Wait until it has come to its stop."""
        assert self._line.poll(PATIENCE_S), "the command hangs"
        try:
            said = self._line.recv()
        except EOFError:
            said = None
        assert said == "stopped", f"it ended before its stop: {self.end()}"

    def go_on(self) -> None:
        """Let it go on behind its stop."""
        self._line.send("go on")

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._process.kill()

    def end(self) -> Done:
        """Wait for its end."""
        events = {}
        with contextlib.suppress(EOFError, ConnectionResetError):
            assert self._line.poll(PATIENCE_S), "the command hangs"
            events = self._line.recv()
        self._process.join(PATIENCE_S)
        code = self._process.exitcode
        assert code is not None, "the command hangs"
        stdout, stderr = (p.read_text("utf-8", errors="replace") for p in self._outputs)
        return Done(code, stdout, stderr, events)


class _Watch:
    """Counts the events of this process, and stops at one of them."""

    def __init__(self, home: str, stop: Stop | None, line: Connection) -> None:
        self._home, self._stop, self._line = home, stop, line
        self._ours: dict[str, bool] = {}
        self._counters = {"call": count(1), "change": count(1)}
        self._last: dict[Event, int] = {"call": 0, "change": 0}

    def begin(self, counted: Collection[Event]) -> None:
        if "change" in counted:
            sys.addaudithook(self._audit)
        if "call" in counted:
            threading.setprofile(self._profile)
            sys.setprofile(self._profile)

    def end(self) -> dict[Event, int]:
        sys.setprofile(None)
        threading.setprofile(None)
        return self._last

    def _profile(self, frame: FrameType, event: str, _argument: Any) -> None:
        if event not in ("call", "c_call"):
            return
        file = frame.f_code.co_filename
        ours = self._ours.get(file)
        if ours is None:
            inside = Path(file).is_relative_to(PROJECT_ROOT)
            ours = self._ours[file] = inside and file != __file__ and "site-packages" not in file
        if ours:
            self._happen("call")

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR) if mode is None else set(mode) & set("wax+")
        else:
            path, writes = (arguments or ("",))[0], event in _CHANGES
        if writes and isinstance(path, str | Path) and str(path).startswith(self._home):
            self._happen("change")

    def _happen(self, event: Event) -> None:
        number = self._last[event] = next(self._counters[event])
        if self._stop == Stop(event, number):
            self._stop = None
            self.end()  # what follows is as fast as ever
            self._line.send("stopped")
            self._line.recv()


def _run(
    arguments: list[str],
    variables: dict[str, str],
    home: str,
    outputs: list[Path],
    stop: Stop | None,
    counted: Collection[Event],
    file_size: int | None,
    line: Connection,
) -> None:
    """The process of a command."""
    import resource

    import torch

    from longtrail import main

    os.environ.clear()
    os.environ.update(variables)
    for number, path in enumerate(outputs, start=1):
        file = os.open(path, os.O_WRONLY)
        os.dup2(file, number)
        os.close(file)
    torch.set_num_threads(1)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    watch = _Watch(home, stop, line)
    watch.begin(counted)
    code: Any = 0
    try:
        main(arguments, prog_name="longtrail")
    except SystemExit as end:
        code = end.code
    finally:
        events = watch.end()
    line.send(events)
    sys.exit(code)
