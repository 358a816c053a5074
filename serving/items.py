"""The whole catalogue's features, kept in process memory.

Reading thousands of keys from an online store for every request costs more than the model does. So
items are read once, and again in the background from time to time; no request waits for that. What
depends on the moment of a request alone, the age of a moment in the features, is brought up to that
moment in each request.

Shapes: R = items, Q = width of a deep output, D = width of a text vector.
"""

import logging
import threading
import time
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from encoders.inputs import ItemInputs
from feature_repo.errors import LongtrailError
from feature_repo.features import ItemFeatures, OnlineReader, ages_days
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
_READ_ITEMS = 256
_READ_DUTY = 0.2
"""Share of the time that reading again may take of a process that answers requests meanwhile."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

_log = logging.getLogger(__name__)


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
        row: item_id -> row.
    """

    at: datetime
    item_ids: NDArray[np.object_]
    text_ids: NDArray[np.int64]
    inputs: ItemInputs
    age_columns: NDArray[np.int64]
    moments: NDArray[np.float64]
    recent_behaviors: NDArray[np.float32]
    outputs: NDArray[np.float32] | None
    row: dict[str, int]

    def take(self, rows: NDArray[np.intp]) -> "ItemSnapshot":
        """Only the given rows, in their order."""
        item_ids = self.item_ids[rows]
        return replace(
            self,
            item_ids=item_ids,
            text_ids=self.text_ids[rows],
            inputs=self.inputs.take(rows),
            moments=self.moments[rows],
            recent_behaviors=self.recent_behaviors[rows],
            outputs=None if self.outputs is None else self.outputs[rows],
            row={str(item_id): i for i, item_id in enumerate(item_ids)},
        )

    def at_moment(self, at: datetime) -> "ItemSnapshot":
        """The same items with their ages as of ``at``."""
        if at == self.at or not len(self.age_columns):
            return replace(self, at=at)
        dense = self.inputs.candidate_dense.copy()
        times = np.full(len(dense), (at - _EPOCH) // _MICROSECOND, dtype=np.int64)
        dense[:, self.age_columns] = ages_days(self.moments, times)
        return replace(self, at=at, inputs=replace(self.inputs, candidate_dense=dense))

    def merged(self, other: "ItemSnapshot") -> "ItemSnapshot":
        """Return the rows of both, by item id; both as of one moment."""
        assert self.at == other.at, (self.at, other.at)
        whole = _concatenate([self, other])
        return whole.take(_ascending(whole.item_ids))


@dataclass(frozen=True)
class Catalogue:
    """Every known item, and what counts as popular and alike among them.

    Args:
        scorer: What the items' inputs were made for; rows of texts are those of its table.
        items: The items.
        directions: float32 [R, Q or D]; deep outputs, or texts' vectors where there are none, at
            unit length; all zero where an item has no text.
        popular_from: Least ``recent_behaviors`` of the most popular :data:`POPULAR_SHARE`; above 0.
        alike_from: Least cosine at which two texts are called alike (:data:`ALIKE_SHARE`).
    """

    scorer: Scorer
    items: ItemSnapshot
    directions: NDArray[np.float32]
    popular_from: float
    alike_from: float

    @cached_property
    def by_popularity(self) -> NDArray[np.intp]:
        """Rows of all items, the most popular first."""
        return np.argsort(-self.items.recent_behaviors, kind="stable")

    def ids_of_keys(self, keys: NDArray[np.int64]) -> list[str | None]:
        """Ids of the items with these keys, None where one is no item's."""
        ordered, order = self._key_order
        if not len(ordered):
            return [None] * len(keys)
        places = np.minimum(ordered.searchsorted(keys), len(ordered) - 1)
        ids = self.items.item_ids[order[places]]
        return [
            str(item_id) if found else None
            for item_id, found in zip(ids, ordered[places] == keys, strict=True)
        ]

    @cached_property
    def _key_order(self) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
        order = np.argsort(self.items.inputs.candidate_item_keys)
        return self.items.inputs.candidate_item_keys[order], order

    def rows_of_keys(self, keys: NDArray[np.int64]) -> NDArray[np.intp]:
        """Rows of the items with these keys; those that are no item's are left out."""
        ordered, order = self._key_order
        if not len(ordered):
            return np.zeros(0, dtype=np.intp)
        places = np.minimum(ordered.searchsorted(keys), len(ordered) - 1)
        rows: NDArray[np.intp] = order[places[ordered[places] == keys]]
        return rows


class ItemCache:
    """The catalogue, read again in the background when it is too old; safe for threads.

    Args:
        reader: Reads the online store.
        scorer: Turns features into the program's inputs.
        item_ids: Every item id of the catalogue.
        max_age_s: Seconds after which a request starts another reading, at least 0.
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
        self._max_age_s = max_age_s
        self._reading = threading.Lock()
        self._swapping = threading.Lock()
        self._catalogue: Catalogue | None = None
        self._read_at = 0.0

    def current(self, moment: datetime) -> Catalogue:
        """Return the catalogue; read as of ``moment`` where there is none yet."""
        catalogue = self._catalogue
        if catalogue is None:
            return self.refresh(moment)
        is_old = time.monotonic() - self._read_at > self._max_age_s
        if is_old and self._reading.acquire(blocking=False):
            # The thread releases the lock: a request that comes meanwhile starts no second one.
            threading.Thread(target=self._read_again, args=(moment,), daemon=True).start()
        return self._with_new_texts(catalogue)

    def refresh(self, moment: datetime) -> Catalogue:
        """Read the whole catalogue as of ``moment`` now, however fresh the last reading is."""
        with self._reading:
            return self._read_all(moment, duty=1.0)

    def _read_again(self, moment: datetime) -> None:
        try:
            self._read_all(moment, duty=_READ_DUTY)
        except LongtrailError as error:
            # The last reading serves on; the next attempt is due when it would be too old again.
            self._read_at = time.monotonic()
            _log.warning("the catalogue could not be read again: %s", error)
        finally:
            self._reading.release()

    def _read_all(self, moment: datetime, *, duty: float) -> Catalogue:
        items = self.read(self._item_ids, moment, duty=duty)
        counts = items.recent_behaviors
        least = float(np.quantile(counts, 1 - POPULAR_SHARE)) if len(counts) else 0.0
        alike_from = _alike_from(items.text_ids, self._scorer)
        with self._swapping:
            items = _with_rows(items, self._scorer)  # which may have changed meanwhile
            self._catalogue = Catalogue(
                scorer=self._scorer,
                items=items,
                directions=_directions(items, self._scorer),
                popular_from=max(least, 1.0),
                alike_from=alike_from,
            )
        self._read_at = time.monotonic()
        return self._catalogue

    def _with_new_texts(self, catalogue: Catalogue) -> Catalogue:
        """Look the items' texts up again where others have added to the table."""
        if self._scorer.refreshed() is self._scorer:
            return catalogue
        with self._swapping:
            self._scorer = scorer = self._scorer.refreshed()
            catalogue = self._catalogue or catalogue
            items = _with_rows(catalogue.items, scorer)
            self._catalogue = replace(
                catalogue, scorer=scorer, items=items, directions=_directions(items, scorer)
            )
            return self._catalogue

    def read(
        self, item_ids: NDArray[np.object_], moment: datetime, *, duty: float = 1.0
    ) -> ItemSnapshot:
        """Read items past the cache, by id; those that the store does not know are left out.

        Args:
            item_ids: The ids.
            moment: As of when.
            duty: Share of the time that this may work, in (0, 1]: between two chunks it sleeps.
        """
        item_ids = item_ids[_ascending(item_ids)]
        scorer, chunks = self._scorer, []
        for start in range(0, max(len(item_ids), 1), _READ_ITEMS):
            before = time.perf_counter()
            chunks.append(self._read_chunk(item_ids[start : start + _READ_ITEMS], moment, scorer))
            if duty < 1:
                time.sleep((time.perf_counter() - before) * (1 / duty - 1))
        snapshot = _concatenate(chunks)
        _log.info("read %d items, %d of them known", len(item_ids), len(snapshot.item_ids))
        return snapshot

    def _read_chunk(
        self, item_ids: NDArray[np.object_], moment: datetime, scorer: Scorer
    ) -> ItemSnapshot:
        features = self._reader.online_items(item_ids, at=moment)
        names = scorer.manifest.item_dense_names
        ages = [name for name in features.age_names if name in names]
        moments = features.moments if features.moments is not None else np.zeros((len(item_ids), 0))
        snapshot = ItemSnapshot(
            at=moment,
            item_ids=item_ids,
            text_ids=features.text_ids,
            inputs=scorer.item_side(features),
            age_columns=np.array([names.index(name) for name in ages], dtype=np.int64),
            moments=moments[:, [features.age_names.index(name) for name in ages]],
            recent_behaviors=_recent_behaviors(features, scorer.manifest.scenes),
            outputs=None,
            row={},
        ).take(np.flatnonzero(features.found))
        if not scorer.has_parts:
            return snapshot
        return replace(snapshot, outputs=scorer.item_outputs(snapshot.inputs.candidate_rows))


def _with_rows(items: ItemSnapshot, scorer: Scorer) -> ItemSnapshot:
    """The items with their texts looked up in the scorer's table."""
    rows = scorer.rows(items.text_ids)
    changed = np.flatnonzero(rows != items.inputs.candidate_rows)
    if not len(changed):
        return items
    outputs = items.outputs
    if outputs is not None:
        outputs = outputs.copy()
        outputs[changed] = scorer.item_outputs(rows[changed])
    return replace(items, inputs=replace(items.inputs, candidate_rows=rows), outputs=outputs)


def _concatenate(parts: list[ItemSnapshot]) -> ItemSnapshot:
    """The rows of all parts, of one moment, in their order."""
    first = parts[0]
    outputs = [part.outputs for part in parts if part.outputs is not None]
    item_ids = np.concatenate([part.item_ids for part in parts])
    return replace(
        first,
        item_ids=item_ids,
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
        row={str(item_id): i for i, item_id in enumerate(item_ids)},
    )


def _ascending(item_ids: NDArray[np.object_]) -> NDArray[np.intp]:
    """Return the order of the ids as text."""
    return np.argsort(item_ids.astype(str), kind="stable")


def _recent_behaviors(items: ItemFeatures, scenes: tuple[str, ...]) -> NDArray[np.float32]:
    """Behaviours of the last 30 days per item, all scenes; 0 where the store counts none."""
    wanted = {f"{scene}_count_30d" for scene in scenes}
    columns = [i for i, name in enumerate(items.dense_names) if name in wanted]
    counts: NDArray[np.float32] = np.nansum(items.dense[:, columns], axis=1)
    return counts


def _directions(items: ItemSnapshot, scorer: Scorer) -> NDArray[np.float32]:
    """See :attr:`Catalogue.directions`."""
    if items.outputs is None:
        return scorer.unit_vectors(items.text_ids)
    lengths = np.linalg.norm(items.outputs, axis=1, keepdims=True)
    directions = (items.outputs / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    directions[items.inputs.candidate_rows == 0] = 0
    return directions


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
