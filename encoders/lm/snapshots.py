"""Weights kept while a model learns, for averaging.

While it learns they lie beside its state as ``snapshots/step-<N>.safetensors``, in the finished
model's folder as ``checkpoints/step-<N>/`` with its configuration.
"""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from encoders.lm.model_folder import CHECKPOINTS, WEIGHTS_FILE
from feature_repo.home import complete_file

_FOLDER = "snapshots"


def keep_snapshot(state_folder: Path, step: int, weights: Mapping[str, Tensor]) -> None:
    """Write the weights after a step, as transformers reads them."""
    with complete_file(state_folder / _FOLDER / f"step-{step}.safetensors") as part:
        save_weights(weights, part)


def forget_snapshots(state_folder: Path) -> None:
    """Clear away what a run left that was killed before its first state was kept."""
    shutil.rmtree(state_folder / _FOLDER, ignore_errors=True)


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write weights as transformers reads them."""
    copies = {name: weight.detach().to("cpu").contiguous() for name, weight in weights.items()}
    save_file(copies, path, metadata={"format": "pt"})


def snapshots_in(state_folder: Path) -> list[int]:
    """Steps whose weights are kept, ascending."""
    return sorted(_step(path) for path in (state_folder / _FOLDER).glob("step-*.safetensors"))


def put_snapshots(state_folder: Path, model_folder: Path) -> None:
    """Put the kept weights into a model's folder; they stay where they are, too."""
    for step in snapshots_in(state_folder):
        folder = model_folder / CHECKPOINTS / f"step-{step}"
        folder.mkdir(parents=True)
        kept = state_folder / _FOLDER / f"step-{step}.safetensors"
        try:
            # A second name, not a second copy: the first goes when the run has ended.
            os.link(kept, folder / WEIGHTS_FILE)
        except OSError:  # a file system without second names
            shutil.copy(kept, folder / WEIGHTS_FILE)
        shutil.copy(model_folder / "config.json", folder)


def model_snapshots(model_folder: Path) -> dict[int, Path]:
    """Step -> file of weights, ascending, of a finished model."""
    found = (model_folder / CHECKPOINTS).glob(f"step-*/{WEIGHTS_FILE}")
    return dict(sorted((_step(path.parent), path) for path in found))


def _step(path: Path) -> int:
    found = re.search(r"step-(\d+)", path.name)
    assert found is not None
    return int(found[1])
