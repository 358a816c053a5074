"""The state of a tuning that is not finished, so that a kill costs a few steps at most.

``FOLDER.checkpoint.part/`` holds ``state-<steps>.safetensors`` (weights, the optimiser's moments)
and, written after it, ``state.json``. Nothing is pickled.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor

from feature_repo.errors import EncoderError
from feature_repo.home import complete_file
from feature_repo.manifest import Document

SUFFIX = ".checkpoint.part"
_MADE_BY = "longtrail tune"


class TuningState(Document):
    """What ``state.json`` holds."""

    fingerprint: str
    """Of the settings, the model and the data: a tuning goes on only with the same ones."""
    tensors: str
    """Name of the file that belongs to this state."""
    steps_done: int
    losses: list[float]
    """One per step."""


@dataclass(frozen=True)
class TuningCheckpoint:
    """Where a tuning keeps its state; made by :func:`open_checkpoint`."""

    folder: Path
    fingerprint: str

    def load(self) -> tuple[list[float], dict[str, Tensor]] | None:
        """The losses so far and the tensors, or None where there is no state yet."""
        path = self.folder / "state.json"
        if not path.exists():
            return None
        state = TuningState.load(path, made_by=_MADE_BY)
        return state.losses, load_file(self.folder / state.tensors)

    def save(self, losses: list[float], tensors: Mapping[str, Tensor]) -> None:
        """Write the state after a step; the one before is kept until it is complete."""
        path = self.folder / f"state-{len(losses)}.safetensors"
        with complete_file(path) as part:
            save_file({name: t.detach().contiguous().clone() for name, t in tensors.items()}, part)
        state = TuningState(
            fingerprint=self.fingerprint,
            tensors=path.name,
            steps_done=len(losses),
            losses=losses,
        )
        state.save(self.folder / "state.json")
        for old in self.folder.glob("state-*.safetensors"):
            if old != path:
                old.unlink()


@contextmanager
def open_checkpoint(folder: Path, fingerprint: str) -> Iterator[TuningCheckpoint]:
    """Hold the state of the tuning that makes ``folder``; removed if the block ends without error.

    Raises:
        EncoderError: If another process makes that folder, or began to with other settings.
    """
    kept = folder.with_name(folder.name + SUFFIX)
    kept.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(kept / "lock", timeout=0):
            path = kept / "state.json"
            if path.exists():
                found = TuningState.load(path, made_by=_MADE_BY).fingerprint
                if found != fingerprint:
                    raise EncoderError(
                        f"the tuning of {folder} was begun with other settings or data: give "
                        f"another folder, or delete {kept} to begin it anew"
                    )
            try:
                yield TuningCheckpoint(kept, fingerprint)
            except BaseException:
                if not path.exists():  # nothing to go on from
                    shutil.rmtree(kept)
                raise
            shutil.rmtree(kept)
    except Timeout as error:
        raise EncoderError(f"another process is tuning {folder}; wait for it to end") from error
