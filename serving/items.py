"""Items as serving holds them: their side of the program's inputs, and what is known of them all.

Shapes: R = items, Q = width of a deep output, D = width of a text vector, A = ages among features.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from encoders.inputs import ItemInputs
from feature_repo.features import ages_days
from feature_repo.moments import micros
from serving.scoring import Scorer


@dataclass(frozen=True)
class ItemSnapshot:
    """R items that the store knows, as of one moment.

    Args:
        at: The moment, UTC.
        item_ids: str objects [R]; ascending in what :class:`ItemCache` gives.
        text_ids: int64 [R]; 0 where the item has no text.
        inputs: The program's item side, R rows.
        age_columns: int64 [A]; columns of ``inputs.candidate_dense`` that are days before ``at``.
        moments: float64 [R, A]; where these days begin, epoch seconds, NaN where missing.
        recent_behaviors: float32 [R]; of the last 30 days, all scenes and users.
        outputs: float32 [R, Q]; deep outputs, where the model has them.
    """

    at: datetime
    item_ids: NDArray[np.object_]
    text_ids: NDArray[np.int64]
    inputs: ItemInputs
    age_columns: NDArray[np.int64]
    moments: NDArray[np.float64]
    recent_behaviors: NDArray[np.float32]
    outputs: NDArray[np.float32] | None

    @cached_property
    def row(self) -> dict[str, int]:
        """item_id -> row."""
        return {str(item_id): i for i, item_id in enumerate(self.item_ids)}

    def take(self, rows: NDArray[np.intp]) -> "ItemSnapshot":
        """Only the given rows, in their order."""
        return replace(
            self,
            item_ids=self.item_ids[rows],
            text_ids=self.text_ids[rows],
            inputs=self.inputs.take(rows),
            moments=self.moments[rows],
            recent_behaviors=self.recent_behaviors[rows],
            outputs=None if self.outputs is None else self.outputs[rows],
        )

    def at_moment(self, at: datetime) -> "ItemSnapshot":
        """The same items with their ages as of ``at``."""
        if at == self.at or not len(self.age_columns):
            return replace(self, at=at)
        dense = self.inputs.candidate_dense.copy()
        times = np.full(len(dense), micros(at), dtype=np.int64)
        dense[:, self.age_columns] = ages_days(self.moments, times)
        return replace(self, at=at, inputs=replace(self.inputs, candidate_dense=dense))

    def merged(self, other: "ItemSnapshot") -> "ItemSnapshot":
        """Return the rows of both, by item id; both as of one moment."""
        assert self.at == other.at, (self.at, other.at)
        whole = concatenate([self, other])
        return whole.take(ascending(whole.item_ids))


@dataclass(frozen=True)
class Catalogue:
    """Every known item, and what counts as popular and alike among them.

    Args:
        scorer: What the items' inputs were made for; rows of texts are those of its table.
        items: The items.
        directions: float32 [R, Q or D]; deep outputs, or texts' vectors where there are none, at
            unit length; all zero where an item has no text.
        popular_from: Least ``recent_behaviors`` of what is called popular; above 0.
        alike_from: Least cosine at which two texts are called alike.
    """

    scorer: Scorer
    items: ItemSnapshot
    directions: NDArray[np.float32]
    popular_from: float
    alike_from: float

    def with_scorer(self, scorer: Scorer) -> "Catalogue":
        """The same for a table to which rows were only added; keeps what was worked out."""
        same = copy.copy(self)
        object.__setattr__(same, "scorer", scorer)
        return same

    def work_out(self) -> None:
        """Sort what requests need sorted, before the first of them does."""
        self.by_popularity, self._key_order, self.items.row  # noqa: B018

    @cached_property
    def by_popularity(self) -> NDArray[np.intp]:
        """Rows of all items, the most popular first."""
        return np.argsort(-self.items.recent_behaviors, kind="stable")

    @cached_property
    def _key_order(self) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
        order = np.argsort(self.items.inputs.candidate_item_keys)
        return self.items.inputs.candidate_item_keys[order], order

    def _find(self, keys: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Rows of the items with these keys, and which keys are an item's."""
        ordered, order = self._key_order
        if not len(ordered):
            return np.zeros(len(keys), dtype=np.intp), np.zeros(len(keys), dtype=bool)
        places = np.minimum(ordered.searchsorted(keys), len(ordered) - 1)
        return order[places], ordered[places] == keys

    def rows_of_keys(self, keys: NDArray[np.int64]) -> NDArray[np.intp]:
        """Rows of the items with these keys; those that are no item's are left out."""
        rows, found = self._find(keys)
        return rows[found]

    def ids_of_keys(self, keys: NDArray[np.int64]) -> list[str | None]:
        """Ids of the items with these keys, None where one is no item's."""
        ids: list[str | None] = [None] * len(keys)
        rows, found = self._find(keys)
        for place in np.flatnonzero(found):
            ids[place] = str(self.items.item_ids[rows[place]])
        return ids


def concatenate(parts: Sequence[ItemSnapshot]) -> ItemSnapshot:
    """The rows of all parts, of one moment, in their order."""
    first = parts[0]
    outputs = [part.outputs for part in parts if part.outputs is not None]
    return replace(
        first,
        item_ids=np.concatenate([part.item_ids for part in parts]),
        text_ids=np.concatenate([part.text_ids for part in parts]),
        inputs=ItemInputs(
            **{
                field.name: np.concatenate([getattr(part.inputs, field.name) for part in parts])
                for field in fields(ItemInputs)
            }
        ),
        moments=np.concatenate([part.moments for part in parts]),
        recent_behaviors=np.concatenate([part.recent_behaviors for part in parts]),
        outputs=np.concatenate(outputs) if outputs else None,
    )


def ascending(item_ids: NDArray[np.object_]) -> NDArray[np.intp]:
    """Return the order of the ids as text."""
    return np.argsort(item_ids.astype(str), kind="stable")
