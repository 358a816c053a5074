"""What makes a run the one it is: its name, and the hash of all that decides its weights."""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from feature_repo.errors import ArtifactError
from training.artifact import describe_recipe
from training.dataset import ClickData
from training.impressions import Impressions
from training.recipes import Recipe

_CHUNK_ROWS = 10_000
"""Rows hashed at a time: slices of longer histories are copied to be hashed."""


def new_run_name(recipe: str) -> str:
    """``<recipe>-<YYYYMMDD-HHMMSS>``."""
    return f"{recipe}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


def check_run_name(name: str) -> None:
    """Refuse what cannot name a folder.

    Raises:
        ArtifactError: If the name is a path, hidden, or that of an unfinished file.
    """
    if not name or Path(name).name != name or name.startswith(".") or name.endswith(".part"):
        raise ArtifactError(f"--run {name!r} is no name for a folder: use letters, digits, - and _")


def run_fingerprint(
    recipe: Recipe, data: Mapping[str, ClickData], encoder_fingerprint: str, device_type: str
) -> str:
    """Hash of all that decides the weights; a killed run goes on only where it is the same.

    The number of processes and of threads is not part of it: they change how sums are rounded and
    which rows dropout hits, so a run may go on with others, though not bit by bit as it would have.

    Args:
        recipe: What is trained.
        data: The splits ``train`` and ``valid``: what is learned from, and what chooses the best
            weights. Their values are hashed, so features that were built anew count as well.
        encoder_fingerprint: Of the vectors.
        device_type: ``cpu``, ``cuda``: each draws random numbers of its own.
    """
    hasher = xxhash.xxh3_128()
    parts = {
        "recipe": describe_recipe(recipe),
        "encoder": encoder_fingerprint,
        "device": device_type,
        "columns": [data["train"].user_dense_names, data["train"].item_dense_names],
        "vocabularies": data["train"].category_vocabularies,
    }
    hasher.update(json.dumps(parts, sort_keys=True).encode())
    for split in ("train", "valid"):
        _update(hasher, data[split])
    return hasher.hexdigest()


def _update(hasher: xxhash.xxh3_128, rows: Any) -> None:
    """Take in all arrays of a dataclass and of those in it; the impressions are only for people."""
    for field in fields(rows):
        values = getattr(rows, field.name)
        if isinstance(values, np.ndarray):
            hasher.update(f"{field.name} {values.dtype} {values.shape}".encode())
            for start in range(0, len(values), _CHUNK_ROWS):
                hasher.update(np.ascontiguousarray(values[start : start + _CHUNK_ROWS]).data)
        elif is_dataclass(values) and not isinstance(values, Impressions):
            _update(hasher, values)
