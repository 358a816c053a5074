"""From what the reader returns to what a model reads: one code for training and serving.

Shapes: see :data:`feature_repo.artifact.PROGRAM_INPUTS`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoders.table import EmbeddingTable
from feature_repo.behavior import hash63_bytes
from feature_repo.features import ItemFeatures, UserFeatures


@dataclass(frozen=True)
class UserInputs:
    """The user side of the program's inputs, numpy."""

    history_rows: NDArray[np.int64]
    history_item_keys: NDArray[np.int64]
    history_ages: NDArray[np.float32]
    history_totals: NDArray[np.float32]
    user_dense: NDArray[np.float32]

    def last(self, sequence_length: int) -> "UserInputs":
        """The same with at most the newest ``sequence_length`` behaviours per scene; no copy."""
        kept = slice(-sequence_length, None)
        return replace(
            self,
            history_rows=self.history_rows[..., kept],
            history_item_keys=self.history_item_keys[..., kept],
            history_ages=self.history_ages[..., kept],
        )

    def take(self, rows: NDArray[np.integer[Any]]) -> "UserInputs":
        """The rows at these positions."""
        return UserInputs(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


@dataclass(frozen=True)
class ItemInputs:
    """The item side of the program's inputs, numpy, one row per candidate: [R] and [R, ...]."""

    candidate_rows: NDArray[np.int64]
    candidate_item_keys: NDArray[np.int64]
    candidate_dense: NDArray[np.float32]
    candidate_categories: NDArray[np.int64]
    neighbor_keys: NDArray[np.int64]
    """[R, K]; not an input of the program, but of :mod:`encoders.evidence`."""
    neighbor_weights: NDArray[np.float32]
    """[R, K, 2]; likewise."""

    def without_neighbors(self) -> "ItemInputs":
        """The same with K = 0: they take more room than all else, and a program reads none."""
        return replace(
            self,
            neighbor_keys=self.neighbor_keys[:, :0].copy(),
            neighbor_weights=self.neighbor_weights[:, :0].copy(),
        )

    def take(self, rows: NDArray[np.integer[Any]] | slice) -> "ItemInputs":
        """The rows at these positions."""
        return ItemInputs(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def user_inputs(users: UserFeatures, table: EmbeddingTable, *, scenes: Sequence[str]) -> UserInputs:
    """Look the behaviour ids up in the table; all kept behaviours of each scene.

    A behaviour whose vector is not in the table is padding: its row is 0.
    """
    sequences = [users.sequences[scene] for scene in scenes]
    rows = np.stack([table.rows(s.behavior_ids) for s in sequences], axis=1)
    return UserInputs(
        history_rows=rows,
        history_item_keys=np.stack([s.item_keys for s in sequences], axis=1),
        history_ages=np.stack([users.ages(scene) for scene in scenes], axis=1),
        history_totals=np.stack([s.total for s in sequences], axis=1).astype(np.float32),
        user_dense=users.dense,
    )


def history_keys(
    users: UserFeatures, inputs: UserInputs, scenes: Sequence[str], length: int
) -> NDArray[np.int64]:
    """What the newest ``length`` behaviours of each scene are, as one number per user.

    Deep outputs of equal histories are equal as long as ages are. A behaviour whose vector is not
    in the table is none, so the key changes when the vector comes.

    Args:
        users: Features of R users.
        inputs: Of the same users, all kept behaviours.
        scenes: The scenes of ``inputs``, in their order.
        length: Behaviours per scene, at least 1.

    Returns:
        int64 [R], never 0.
    """
    sequences = [users.sequences[scene] for scene in scenes]
    columns = np.stack(
        [np.stack([s.behavior_ids[:, -length:], s.timestamps[:, -length:]], 1) for s in sequences],
        axis=1,
    )  # (R, S, 2, L)
    there = (inputs.history_rows[:, :, None, -length:] != 0).astype(np.int64)
    rows = np.ascontiguousarray(columns * there)
    return np.array([hash63_bytes(row.tobytes()) for row in rows], dtype=np.int64)


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
        neighbor_keys=items.neighbor_keys,
        neighbor_weights=items.neighbor_weights,
    )
