"""The whole catalogue's features, kept in process memory as of one moment.

Reading thousands of keys from an online store for every request costs more than the model does, so
items are read once, and again when the moment asked for has moved too far.
"""

import logging
import threading
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from encoders.inputs import ItemInputs
from feature_repo.features import ItemFeatures, OnlineReader
from serving.scoring import Scorer

POPULAR_SHARE = 0.1
"""The part of the catalogue that is called popular: a decile, as popularity is usually cut."""

ALIKE_SHARE = 0.001
"""Texts are called alike when closer than all but this part of random pairs of items.

Encoders differ in how close unrelated texts lie, so the bar is measured, not set. A history has at
most a few hundred behaviours, so an item that is unrelated to all of them rarely passes.
"""

_NUM_PAIRS = 10_000  # ten of them beyond ALIKE_SHARE
_SAME_TEXT = 0.999  # cosine at which texts are alike whatever the random pairs say

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ItemSnapshot:
    """R items that the store knows, as of one moment.

    Args:
        at: The moment, UTC.
        item_ids: str objects [R]; ascending in what :class:`ItemCache` gives.
        text_ids: int64 [R]; 0 where the item has no text.
        inputs: The program's item side, R rows.
        recent_behaviors: float32 [R]; of the last 30 days, all scenes and users.
        row: item_id -> row.
    """

    at: datetime
    item_ids: NDArray[np.object_]
    text_ids: NDArray[np.int64]
    inputs: ItemInputs
    recent_behaviors: NDArray[np.float32]
    row: dict[str, int]

    def take(self, rows: NDArray[np.intp]) -> "ItemSnapshot":
        """Only the given rows, in their order."""
        return ItemSnapshot(
            at=self.at,
            item_ids=self.item_ids[rows],
            text_ids=self.text_ids[rows],
            inputs=self.inputs.take(rows),
            recent_behaviors=self.recent_behaviors[rows],
            row={str(item_id): i for i, item_id in enumerate(self.item_ids[rows])},
        )

    def merged(self, other: "ItemSnapshot") -> "ItemSnapshot":
        """Return the rows of both, by item id."""
        item_ids = np.concatenate([self.item_ids, other.item_ids])
        return ItemSnapshot(
            at=self.at,
            item_ids=item_ids,
            text_ids=np.concatenate([self.text_ids, other.text_ids]),
            inputs=ItemInputs(
                **{
                    field.name: np.concatenate(
                        [getattr(self.inputs, field.name), getattr(other.inputs, field.name)]
                    )
                    for field in fields(ItemInputs)
                }
            ),
            recent_behaviors=np.concatenate([self.recent_behaviors, other.recent_behaviors]),
            row={},
        ).take(_ascending(item_ids))


@dataclass(frozen=True)
class Catalogue:
    """Every known item, and what counts as popular and alike among them.

    Args:
        items: The items.
        popular_from: Least ``recent_behaviors`` of the most popular :data:`POPULAR_SHARE`; above 0.
        alike_from: Least cosine at which two texts are called alike (:data:`ALIKE_SHARE`).
    """

    items: ItemSnapshot
    popular_from: float
    alike_from: float


class ItemCache:
    """The catalogue, read again when it is too old; safe for threads.

    Args:
        reader: Reads the online store.
        scorer: Turns features into the program's inputs.
        item_ids: Every item id of the catalogue.
        max_age_s: Seconds by which the reading may differ from the moment asked for, at least 0.
    """

    def __init__(
        self,
        reader: OnlineReader,
        scorer: Scorer,
        item_ids: NDArray[np.object_],
        *,
        max_age_s: float,
    ) -> None:
        self._reader = reader
        self._scorer = scorer
        self._item_ids = item_ids
        self._max_age = timedelta(seconds=max_age_s)
        self._lock = threading.Lock()
        self._catalogue: Catalogue | None = None

    def at(self, moment: datetime) -> Catalogue:
        """Return the catalogue as of ``moment``, give or take ``max_age_s``."""
        catalogue = self._catalogue
        if self._is_fresh(catalogue, moment):
            return catalogue
        # Requests that find it too old wait for one refresh instead of each reading everything.
        with self._lock:
            catalogue = self._catalogue
            if not self._is_fresh(catalogue, moment):
                catalogue = self._catalogue = self._read_all(moment)
            return catalogue

    def refresh(self, moment: datetime) -> Catalogue:
        """Read the whole catalogue as of ``moment`` now, however fresh the last reading is."""
        with self._lock:
            self._catalogue = self._read_all(moment)
            return self._catalogue

    def _is_fresh(self, catalogue: Catalogue | None, moment: datetime) -> TypeGuard[Catalogue]:
        return catalogue is not None and abs(moment - catalogue.items.at) <= self._max_age

    def _read_all(self, moment: datetime) -> Catalogue:
        items = self.read(self._item_ids, moment)
        counts = items.recent_behaviors
        least = float(np.quantile(counts, 1 - POPULAR_SHARE)) if len(counts) else 0.0
        return Catalogue(
            items=items,
            popular_from=max(least, 1.0),
            alike_from=_alike_from(items.text_ids, self._scorer),
        )

    def read(self, item_ids: NDArray[np.object_], moment: datetime) -> ItemSnapshot:
        """Read items past the cache, by id; those that the store does not know are left out."""
        item_ids = item_ids[_ascending(item_ids)]
        features = self._reader.online_items(item_ids, at=moment)
        snapshot = ItemSnapshot(
            at=moment,
            item_ids=item_ids,
            text_ids=features.text_ids,
            inputs=self._scorer.item_side(features),
            recent_behaviors=_recent_behaviors(features, self._scorer.manifest.scenes),
            row={},
        ).take(np.flatnonzero(features.found))
        _log.info("read %d items, %d of them known", len(item_ids), len(snapshot.item_ids))
        return snapshot


def _ascending(item_ids: NDArray[np.object_]) -> NDArray[np.intp]:
    """Return the order of the ids as text."""
    return np.argsort(item_ids.astype(str), kind="stable")


def _recent_behaviors(items: ItemFeatures, scenes: tuple[str, ...]) -> NDArray[np.float32]:
    """Behaviours of the last 30 days per item, all scenes; 0 where the store counts none."""
    wanted = {f"{scene}_count_30d" for scene in scenes}
    columns = [i for i, name in enumerate(items.dense_names) if name in wanted]
    counts: NDArray[np.float32] = np.nansum(items.dense[:, columns], axis=1)
    return counts


def _alike_from(text_ids: NDArray[np.int64], scorer: Scorer) -> float:
    """Return the cosine that only :data:`ALIKE_SHARE` of random pairs of texts exceed."""
    texts = np.unique(text_ids[text_ids != 0])
    if len(texts) < 2:
        return _SAME_TEXT
    draw = np.random.default_rng(
        0
    )  # the same pairs every time: reasons do not change by themselves
    first = draw.integers(len(texts), size=_NUM_PAIRS)
    second = (first + draw.integers(1, len(texts), size=_NUM_PAIRS)) % len(texts)
    pairs = scorer.unit_vectors(texts[first]), scorer.unit_vectors(texts[second])
    cosines = np.einsum("pd,pd->p", *pairs)
    return min(float(np.quantile(cosines, 1 - ALIKE_SHARE)), _SAME_TEXT)
