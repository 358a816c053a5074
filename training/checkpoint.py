"""The state of a run that is not finished: ``runs/<run>.checkpoint.part/``."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from encoders.checkpoint import SUFFIX, Checkpoint, SavedState, checkpoint_folder, open_checkpoint
from feature_repo.errors import ArtifactError, StoreError
from feature_repo.home import Home


class RunState(SavedState):
    """What ``state.json`` holds; the fingerprint is :func:`training.identity.run_fingerprint`."""

    step: int
    """Steps of the optimiser done, of all epochs; the place in the epoch's plan follows from it."""
    num_rows: int
    """Rows learned from since the last validation."""
    loss_sum: float
    """Sum of their losses."""
    best_auc: float | None
    validations_since_best: int
    history: list[dict[str, Any]]
    """One entry per validation."""


RunCheckpoint = Checkpoint[RunState]


@contextmanager
def open_run_checkpoint(
    home: Home, run: str, fingerprint: str, *, main: bool = True
) -> Iterator[RunCheckpoint]:
    """Hold the state of a run; see :func:`encoders.checkpoint.open_checkpoint`.

    Args:
        home: Where runs lie.
        run: Name of the run.
        fingerprint: Of the recipe, data and encoder.
        main: Whether this process writes the run; one that only learns with it holds nothing.

    Raises:
        ArtifactError: If another process trains this run, or if it was begun with other settings,
            or by another version.
    """
    if not main:
        yield Checkpoint(checkpoint_folder(home.runs / run), fingerprint, RunState)
        return
    with open_checkpoint(
        home.runs / run, fingerprint, RunState, what=f"run {run!r}", error=ArtifactError
    ) as checkpoint:
        yield checkpoint


def find_unfinished(home: Home, recipe: str, fingerprint: str) -> str | None:
    """The newest run of a recipe that was killed and can go on, by name; None if there is none."""
    for folder in sorted(home.runs.glob(f"{recipe}-*{SUFFIX}"), reverse=True):
        try:
            state = Checkpoint(folder, fingerprint, RunState).state()
        except StoreError:  # of another version
            continue
        if state is not None and state.fingerprint == fingerprint:
            return folder.name.removesuffix(SUFFIX)
    return None
