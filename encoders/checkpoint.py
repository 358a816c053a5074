"""The state of learning that is not finished, so that a kill costs few steps.

A folder ``<what is made>.checkpoint.part`` holds ``state-<step>.safetensors`` (weights, the
optimiser's moments) and, written after it, ``state.json``. Nothing is pickled. There is no state of
random generators: each step draws from a stream of its own.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from feature_repo.errors import LongtrailError, StoreError
from feature_repo.home import complete_file
from feature_repo.manifest import Document

SUFFIX = ".checkpoint.part"
STATE_FILE = "state.json"


class SavedState(Document):
    """What ``state.json`` holds of any learning."""

    fingerprint: str
    """Of all that decides the weights: learning goes on only where it is the same."""
    tensors: str
    """Name of the file that belongs to this state."""


State = TypeVar("State", bound=SavedState)


@dataclass(frozen=True)
class Checkpoint(Generic[State]):
    """Where learning keeps its state; made by :func:`open_checkpoint`."""

    folder: Path
    fingerprint: str
    state_type: type[State]

    def state(self) -> State | None:
        """The last state without its tensors, or None where there is none yet.

        Raises:
            StoreError: If it is of another version.
        """
        path = self.folder / STATE_FILE
        if not path.exists():
            return None
        return self.state_type.load(path, made_by="the same command")

    def load(self) -> tuple[State, dict[str, Tensor]] | None:
        """The last state, on the CPU, or None where there is none yet.

        The tensors are the file's own pages, read when they are looked at and shared by all
        processes of a machine: they take no memory of their own until they are written to.
        """
        state = self.state()
        return None if state is None else (state, load_file(self.folder / state.tensors))

    def save(self, state: State, tensors: Mapping[str, Tensor]) -> None:
        """Write a state; the one before is kept until it is complete."""
        path = self.folder / state.tensors
        with complete_file(path) as part:
            save_file(_apart(tensors), part)
        state.save(self.folder / STATE_FILE)
        for old in self.folder.glob("state-*.safetensors"):
            if old != path:
                old.unlink()


@contextmanager
def open_checkpoint(
    result: Path,
    fingerprint: str,
    state_type: type[State],
    *,
    what: str,
    error: type[LongtrailError],
) -> Iterator[Checkpoint[State]]:
    """Hold the folder of unfinished learning; it is removed where the block ends without an error.

    Args:
        result: The folder that will be made.
        fingerprint: Of the settings, the data and the vectors or model.
        state_type: What ``state.json`` holds.
        what: Names the learning in sentences: "run 'x'", "the tuning of FOLDER".
        error: What is raised.

    Raises:
        LongtrailError: ``error``: if another process makes the same, or if it was begun with other
            settings, or by another version.
    """
    folder = checkpoint_folder(result)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint(folder, fingerprint, state_type)
    try:
        with FileLock(folder / "lock", timeout=0):
            try:
                state = checkpoint.state()
            except StoreError as problem:
                raise error(f"{what} was begun with another version: delete {folder}") from problem
            if state is not None and state.fingerprint != fingerprint:
                raise error(
                    f"{what} was begun with other settings or data: give another name, "
                    f"or delete {folder} to begin it anew"
                )
            try:
                yield checkpoint
            except BaseException:
                if not (folder / STATE_FILE).exists():  # nothing to go on from
                    shutil.rmtree(folder)
                raise
            # First, for a kill in between must leave no state without its tensors.
            (folder / STATE_FILE).unlink(missing_ok=True)
            shutil.rmtree(folder)
    except Timeout as problem:
        raise error(f"another process is at {what}; wait for it to end") from problem


def checkpoint_folder(result: Path) -> Path:
    """Where the state lies of the learning that makes the folder ``result``."""
    return result.with_name(result.name + SUFFIX)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter name, flat."""
    return {
        f"optimizer/{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def beside(value: Tensor, parameter: Tensor) -> Tensor:
    """A value on the device of a parameter."""
    return value.to(parameter.device)


def restore_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    place: Callable[[Tensor, Tensor], Tensor] = beside,
) -> None:
    """Put back what :func:`optimizer_tensors` gave, where the optimiser itself would keep it.

    Args:
        model: The optimiser learns some or all of its parameters.
        optimizer: Whose state is replaced.
        tensors: What was given, and anything else; on the CPU.
        place: Brings a value to its parameter.

    Source:
        torch's ``Optimizer.load_state_dict``: the count of steps lies beside the parameter for a
        fused or a captured optimiser, whose kernels read it there, else on the CPU.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        state = without_prefix(f"optimizer/{name}", tensors)
        group = groups.get(id(parameter))
        if not state or group is None:
            continue
        counts_on_cpu = not (group.get("fused") or group.get("capturable"))
        optimizer.state[parameter] = {
            key: value if key == "step" and counts_on_cpu else place(value, parameter)
            for key, value in state.items()
        }


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names under ``prefix/``."""
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under ``prefix/``, by the rest of their names."""
    start = f"{prefix}/"
    return {n.removeprefix(start): v for n, v in tensors.items() if n.startswith(start)}


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU; copied where they share memory, which safetensors refuses."""
    apart: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        there = tensor.detach().to("cpu").contiguous()
        memory = there.untyped_storage().data_ptr()
        apart[name] = there.clone() if memory in taken else there
        taken.add(memory)
    return apart
