"""The state of a run that is not finished, so that a kill costs few steps.

``runs/<run>.checkpoint.part/`` holds ``state-<step>.safetensors`` (weights, average, best weights,
the optimiser's moments) and, written after it, ``state.json``. Nothing is pickled. There is no
state of random generators: each step draws from a stream of its own (:mod:`training.loop`).
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from feature_repo.errors import ArtifactError, StoreError
from feature_repo.home import Home, complete_file
from feature_repo.manifest import Document

logger = logging.getLogger(__name__)

SUFFIX = ".checkpoint.part"
STATE_FILE = "state.json"


class CheckpointState(Document):
    """What ``state.json`` holds."""

    fingerprint: str
    """Of :func:`training.identity.run_fingerprint`: a run goes on only with the same settings."""
    tensors: str
    """Name of the file that belongs to this state."""
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


@dataclass
class Checkpoint:
    """Where one run keeps its state; made by :func:`open_checkpoint`."""

    folder: Path
    fingerprint: str

    def state(self) -> CheckpointState | None:
        """The last state without its tensors, or None where there is none yet."""
        return _read_state(self.folder)

    def load(self) -> tuple[CheckpointState, dict[str, Tensor]] | None:
        """The last state, on the CPU, or None where there is none yet."""
        state = self.state()
        return None if state is None else (state, load_file(self.folder / state.tensors))

    def save(self, state: CheckpointState, tensors: Mapping[str, Tensor]) -> None:
        """Write a state; the one before is kept until it is complete."""
        path = self.folder / state.tensors
        with complete_file(path) as part:
            # Copies, for safetensors refuses weights that share memory.
            copies = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
            save_file({name: t.contiguous() for name, t in copies.items()}, part)
        state.save(self.folder / STATE_FILE)
        for old in self.folder.glob("state-*.safetensors"):
            if old != path:
                old.unlink()


@contextmanager
def open_checkpoint(
    home: Home, run: str, fingerprint: str, *, main: bool = True
) -> Iterator[Checkpoint]:
    """Hold the folder of an unfinished run; it is removed where the block ends without an error.

    Args:
        home: Where runs lie.
        run: Name of the run.
        fingerprint: Of the recipe, data and encoder.
        main: Whether this process writes the run; one that only learns with it holds nothing.

    Raises:
        ArtifactError: If another process trains this run, or if it was begun with other settings,
            or by another version.
    """
    folder = checkpoint_folder(home, run)
    if not main:
        yield Checkpoint(folder, fingerprint)
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            state = _read_state(folder)
            if state is not None and state.fingerprint != fingerprint:
                raise ArtifactError(
                    f"run {run!r} was begun with other settings or data: give another --run, "
                    f"or delete {folder} to begin it anew"
                )
            try:
                yield Checkpoint(folder, fingerprint)
            except BaseException:
                if not (folder / STATE_FILE).exists():  # nothing to go on from
                    shutil.rmtree(folder)
                raise
            # First, for a kill in between must leave no state without its tensors.
            (folder / STATE_FILE).unlink(missing_ok=True)
            shutil.rmtree(folder)
    except Timeout as error:
        raise ArtifactError(f"another process is training run {run!r}; wait for it") from error


def checkpoint_folder(home: Home, run: str) -> Path:
    """Where a run keeps its state; as long as it is there, the run is not finished."""
    return home.runs / f"{run}{SUFFIX}"


def find_unfinished(home: Home, recipe: str, fingerprint: str) -> str | None:
    """The newest run of a recipe that was killed and can go on, by name; None if there is none."""
    for folder in sorted(home.runs.glob(f"{recipe}-*{SUFFIX}"), reverse=True):
        state = _read_state(folder)
        if state is not None and state.fingerprint == fingerprint:
            return folder.name.removesuffix(SUFFIX)
    return None


def _read_state(folder: Path) -> CheckpointState | None:
    """What a folder's state file says; None where there is none."""
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        return CheckpointState.load(path, made_by="longtrail train")
    except StoreError as error:
        raise ArtifactError(
            f"the unfinished run in {folder} was begun with another version: delete that folder"
        ) from error


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter name, flat."""
    return {
        f"optimizer/{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what :func:`optimizer_tensors` gave."""
    for name, parameter in model.named_parameters():
        state = without_prefix(f"optimizer/{name}", tensors)
        if state:
            # Scalars (the count of steps) stay on the CPU, where the optimiser keeps them.
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if value.dim() else value
                for key, value in state.items()
            }


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names under ``prefix/``."""
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under ``prefix/``, by the rest of their names."""
    start = f"{prefix}/"
    return {n.removeprefix(start): v for n, v in tensors.items() if n.startswith(start)}
