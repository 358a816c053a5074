"""The process that ``test_workers`` starts: workers that serve nothing.

Its argument says what they do: ``answer``, ``refuse`` to start, or ``die`` before they answer. It
prints the name of the run once all answer, and stops when its standard input ends. After a SIGHUP
the parent writes ``changed``, and workers that begin later know of it.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable

from feature_repo.errors import LongtrailError
from serving.workers import Workers

MIN_LIFE_S = 1.5


def stop_with_input() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main(what: str) -> None:
    hangups: list[None] = []

    def serve(_place: int, is_replacement: bool, tell: Callable[[str], None]) -> None:
        if is_replacement:
            sys.stderr.write("replaces\n")
        if what == "refuse":
            raise LongtrailError("there is no model: train one")
        if what == "die":
            os._exit(7)
        if what == "break":
            raise RuntimeError("a defect")
        if hangups:
            sys.stderr.write("knows\n")
        stopped = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stopped.set())
        signal.signal(signal.SIGHUP, lambda *_: sys.stderr.write("looked\n"))
        tell("toy-run")
        while not stopped.wait(0.05):
            pass
        sys.stderr.write("stopped\n")

    def hangup() -> None:
        hangups.append(None)
        sys.stderr.write("changed\n")

    def stop() -> None:
        sys.stderr.write("stops\n")

    def gone(process_id: int) -> None:
        sys.stderr.write(f"gone {process_id}\n")

    try:
        workers = Workers(
            serve,
            num_workers=2,
            on_gone=gone,
            on_hangup=hangup,
            on_stop=stop,
            min_life_s=MIN_LIFE_S,
        )
        workers.run(lambda run: print(run, flush=True))  # noqa: T201
    except LongtrailError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    threading.Thread(target=stop_with_input, daemon=True).start()
    main(sys.argv[1])
