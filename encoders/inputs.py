"""From what the reader returns to what a model reads: one code for training and serving.

Shapes: see :data:`feature_repo.artifact.PROGRAM_INPUTS`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from encoders.table import EmbeddingTable
from feature_repo.features import ItemFeatures, UserFeatures


@dataclass(frozen=True)
class UserInputs:
    """The user side of the program's inputs, numpy."""

    history_rows: NDArray[np.int64]
    history_item_keys: NDArray[np.int64]
    history_ages: NDArray[np.float32]
    history_totals: NDArray[np.float32]
    user_dense: NDArray[np.float32]


@dataclass(frozen=True)
class ItemInputs:
    """The item side of the program's inputs, numpy, one row per candidate: [R] and [R, ...]."""

    candidate_rows: NDArray[np.int64]
    candidate_item_keys: NDArray[np.int64]
    candidate_dense: NDArray[np.float32]
    candidate_categories: NDArray[np.int64]


def user_inputs(
    users: UserFeatures, table: EmbeddingTable, *, scenes: Sequence[str], sequence_length: int
) -> UserInputs:
    """Look the behaviour ids up in the table and keep the last ``sequence_length`` of each scene.

    A behaviour whose vector is not in the table is padding: its row is 0.
    """
    last = slice(-sequence_length, None)
    sequences = [users.sequences[scene] for scene in scenes]
    rows = np.stack([table.rows(s.behavior_ids[:, last]) for s in sequences], axis=1)
    return UserInputs(
        history_rows=rows,
        history_item_keys=np.stack([s.item_keys[:, last] for s in sequences], axis=1),
        history_ages=np.stack([users.ages(scene)[:, last] for scene in scenes], axis=1),
        history_totals=np.stack([s.total for s in sequences], axis=1).astype(np.float32),
        user_dense=users.dense,
    )


def item_inputs(
    items: ItemFeatures, table: EmbeddingTable, *, vocabularies: Mapping[str, Sequence[str]]
) -> ItemInputs:
    """Look the titles up in the table and the categories up in their vocabularies."""
    categories = np.zeros((len(items.item_ids), len(vocabularies)), dtype=np.int64)
    for column, (name, values) in enumerate(vocabularies.items()):
        index = {value: i + 1 for i, value in enumerate(values)}
        categories[:, column] = [index.get(value, 0) for value in items.categorical[name]]
    return ItemInputs(
        candidate_rows=table.rows(items.text_ids),
        candidate_item_keys=items.item_keys,
        candidate_dense=items.dense,
        candidate_categories=categories,
    )
