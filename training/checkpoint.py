"""The state of a run that is not finished, so that a kill costs one epoch at most.

``runs/<run>.checkpoint.part/`` holds ``state.safetensors`` (weights, average, best weights, the
optimiser's moments) and, written after it, ``state.json``. Nothing is pickled.
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

from feature_repo.errors import ArtifactError
from feature_repo.home import Home, complete_file
from feature_repo.manifest import Document

logger = logging.getLogger(__name__)

SUFFIX = ".checkpoint.part"


class CheckpointState(Document):
    """What ``state.json`` holds."""

    fingerprint: str
    """Of the recipe, the data and the encoder: a run goes on only with the same ones."""
    tensors: str
    """Name of the file that belongs to this state."""
    epochs_done: int
    best_auc: float | None
    history: list[dict[str, Any]]
    """One entry per validation."""


@dataclass
class Checkpoint:
    """Where one run keeps its state; made by :func:`open_checkpoint`."""

    folder: Path
    fingerprint: str

    def load(self) -> tuple[CheckpointState, dict[str, Tensor]] | None:
        """The last state, or None where the run has not finished an epoch yet."""
        path = self.folder / "state.json"
        if not path.exists():
            return None
        state = CheckpointState.load(path, made_by="longtrail train")
        return state, load_file(self.folder / state.tensors)

    def save(self, state: CheckpointState, tensors: Mapping[str, Tensor]) -> None:
        """Write the state of the end of an epoch; the one before is kept until it is complete."""
        path = self.folder / state.tensors
        with complete_file(path) as part:
            save_file({name: t.detach().contiguous().clone() for name, t in tensors.items()}, part)
        state.save(self.folder / "state.json")
        for old in self.folder.glob("state-*.safetensors"):
            if old != path:
                old.unlink()


@contextmanager
def open_checkpoint(home: Home, run: str, fingerprint: str) -> Iterator[Checkpoint]:
    """Hold the folder of an unfinished run; it is removed where the block ends without an error.

    Raises:
        ArtifactError: If another process trains this run, or if it was begun with other settings.
    """
    folder = home.runs / f"{run}{SUFFIX}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            path = folder / "state.json"
            if path.exists():
                state = CheckpointState.load(path, made_by="longtrail train")
                if state.fingerprint != fingerprint:
                    raise ArtifactError(
                        f"run {run!r} was begun with other settings or data: give another --run, "
                        f"or delete {folder} to begin it anew"
                    )
            try:
                yield Checkpoint(folder, fingerprint)
            except BaseException:
                if not path.exists():  # nothing to go on from
                    shutil.rmtree(folder)
                raise
            shutil.rmtree(folder)
    except Timeout as error:
        raise ArtifactError(f"another process is training run {run!r}; wait for it") from error


def find_unfinished(home: Home, recipe: str, fingerprint: str) -> str | None:
    """The newest run of a recipe that was killed and can go on, by name; None if there is none."""
    for folder in sorted(home.runs.glob(f"{recipe}-*{SUFFIX}"), reverse=True):
        path = folder / "state.json"
        if not path.exists():
            continue
        state = CheckpointState.load(path, made_by="longtrail train")
        if state.fingerprint == fingerprint:
            return folder.name.removesuffix(SUFFIX)
    return None


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
        prefix = f"optimizer/{name}/"
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if state:
            optimizer.state[parameter] = state


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names under ``prefix/``."""
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under ``prefix/``, by the rest of their names."""
    start = f"{prefix}/"
    return {n.removeprefix(start): v for n, v in tensors.items() if n.startswith(start)}
