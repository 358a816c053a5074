"""How long work reports how far it is: libraries call back, the command line draws a bar."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

from tqdm import tqdm


class Progress(Protocol):
    """Receives news of a long step."""

    def __call__(self, advance: int, total: int, **figures: float) -> None:
        """Tell that ``advance`` more of ``total`` units are done, with figures such as the loss."""


def silent(advance: int, total: int, **figures: float) -> None:
    """Ignore all news."""


def part_of(progress: Progress, whole: int) -> Progress:
    """The progress of one of the parts of a step that has ``whole`` units in all."""

    def update(advance: int, total: int, **figures: float) -> None:  # noqa: ARG001
        progress(advance, whole, **figures)

    return update


def in_rounds(progress: Progress, number: int) -> Progress:
    """The progress of ``number`` rounds of equal length as one."""

    def update(advance: int, total: int, **figures: float) -> None:
        progress(advance, total * number, **figures)

    return update


ProgressBars = Callable[[str], AbstractContextManager[Progress]]
"""Opens a bar with a title: for steps that are made of several."""


@contextmanager
def no_bars(_view: str) -> Iterator[Progress]:
    """Open nothing."""
    yield silent


@contextmanager
def progress_bar(what: str, unit: str, *, done: int = 0) -> Iterator[Progress]:
    """A bar on stderr with rate and remaining time; a line now and then where it is no terminal.

    Args:
        what: Its title.
        unit: Of what is counted.
        done: Before it appeared.
    """
    with tqdm(
        desc=what,
        unit=f" {unit}",
        file=sys.stderr,
        initial=done,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        dynamic_ncols=True,
    ) as bar:

        def update(advance: int, total: int, **figures: float) -> None:
            if bar.total != total:
                bar.total = total
            if figures:
                bar.set_postfix({k: f"{v:.4f}" for k, v in figures.items()}, refresh=False)
            bar.update(advance)

        yield update


class BarLine(AbstractContextManager["BarLine"]):
    """Progress bars that follow each other: each appears with its first news and ends the last.

    One that has news again goes on from where it was.
    """

    def __init__(self) -> None:
        self._shown = ExitStack()
        self._progress: Progress = silent
        self._owner: Progress | None = None

    def __exit__(self, *_: object) -> None:
        self._shown.close()
        self._owner = None

    def bar(self, what: str, unit: str) -> Progress:
        """One of the bars."""
        done = 0

        def update(advance: int, total: int, **figures: float) -> None:
            nonlocal done
            if self._owner is not update:
                self._shown.close()
                self._progress = self._shown.enter_context(progress_bar(what, unit, done=done))
                self._owner = update
            self._progress(advance, total, **figures)
            done += advance

        return update
