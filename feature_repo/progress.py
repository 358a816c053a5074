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


ProgressBars = Callable[[str], AbstractContextManager[Progress]]
"""Opens a bar with a title: for steps that are made of several."""


@contextmanager
def no_bars(_view: str) -> Iterator[Progress]:
    """Open nothing."""
    yield silent


@contextmanager
def progress_bar(what: str, unit: str) -> Iterator[Progress]:
    """A bar on stderr with rate and remaining time; a line now and then where it is no terminal."""
    interval_s = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(
        desc=what, unit=f" {unit}", file=sys.stderr, mininterval=interval_s, dynamic_ncols=True
    ) as bar:

        def update(advance: int, total: int, **figures: float) -> None:
            if bar.total != total:
                bar.total = total
            if figures:
                bar.set_postfix({k: f"{v:.4f}" for k, v in figures.items()}, refresh=False)
            bar.update(advance)

        yield update


def late_bar(stack: ExitStack, what: str, unit: str) -> Progress:
    """A progress bar that appears with its first news, so that two steps do not share a line."""
    bars: list[Progress] = []

    def update(advance: int, total: int, **figures: float) -> None:
        if not bars:
            bars.append(stack.enter_context(progress_bar(what, unit)))
        bars[0](advance, total, **figures)

    return update
