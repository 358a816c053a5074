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
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from encoders.table import unit_length
from feature_repo.errors import LongtrailError
from feature_repo.features import ItemFeatures, OnlineReader
from serving.items import Catalogue, ItemSnapshot, ascending, concatenate
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
_log = logging.getLogger(__name__)


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
        self._working = threading.Lock()
        """Held by whoever reads or looks up everything."""
        self._swapping = threading.Lock()
        self._catalogue: Catalogue | None = None
        self._read_at = 0.0

    def current(self, moment: datetime) -> Catalogue:
        """Return the catalogue; read as of ``moment`` where there is none yet."""
        catalogue = self._catalogue
        if catalogue is None:  # whoever comes meanwhile waits for one reading
            with self._working:
                return self._catalogue or self._read_all(moment, duty=1.0)
        if time.monotonic() - self._read_at > self._max_age_s:
            self._in_background(lambda: self._read_all(moment, duty=_READ_DUTY))
        scorer = catalogue.scorer.refreshed()
        return catalogue if scorer is catalogue.scorer else self._with_texts(scorer)

    def refresh(self, moment: datetime) -> Catalogue:
        """Read the whole catalogue as of ``moment`` now, however fresh the last reading is."""
        with self._working:
            return self._read_all(moment, duty=1.0)

    def _in_background(self, work: Callable[[], object]) -> None:
        """Do this beside the requests, unless something of the kind is being done already."""
        if not self._working.acquire(blocking=False):
            return

        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001  # the thread's last line of defence
                # The last catalogue serves on; the next attempt is due when it would be too old
                # again. Only what is no mistake of the operator's needs a traceback.
                self._read_at = time.monotonic()
                defect = None if isinstance(error, LongtrailError) else error
                _log.warning("the catalogue could not be read again: %s", error, exc_info=defect)
            finally:
                self._working.release()

        threading.Thread(target=run, name="catalogue", daemon=True).start()

    def _with_texts(self, scorer: Scorer) -> Catalogue:
        """The catalogue for a table that others have changed."""
        with self._swapping:
            catalogue = self._catalogue
            assert catalogue is not None
            items = catalogue.items
            lacking = items.text_ids[(items.inputs.candidate_rows == 0) & (items.text_ids != 0)]
            if scorer.edition == catalogue.scorer.edition and not scorer.rows(lacking).any():
                self._catalogue = catalogue = catalogue.with_scorer(scorer)
                return catalogue
        # Rows have moved, or titles have got theirs: the old table serves until all is looked up.
        self._in_background(lambda: self._look_up(scorer))
        return catalogue

    def _look_up(self, scorer: Scorer) -> None:
        catalogue = self._catalogue
        assert catalogue is not None
        items = _with_rows(catalogue.items, scorer)
        self._swap(replace(catalogue, scorer=scorer, items=items))

    def _read_all(self, moment: datetime, *, duty: float) -> Catalogue:
        scorer = self._scorer.refreshed()
        items = self.read(self._item_ids, moment, scorer=scorer, duty=duty)
        counts = items.recent_behaviors
        least = float(np.quantile(counts, 1 - POPULAR_SHARE)) if len(counts) else 0.0
        catalogue = Catalogue(
            scorer=scorer,
            items=items,
            directions=np.zeros((0, 0), dtype=np.float32),
            popular_from=max(least, 1.0),
            alike_from=_alike_from(items.text_ids, scorer),
        )
        self._read_at = time.monotonic()
        return self._swap(catalogue)

    def _swap(self, catalogue: Catalogue) -> Catalogue:
        """Serve with another catalogue, after what requests would work out once."""
        directions = _directions(catalogue.items, catalogue.scorer)
        catalogue = replace(catalogue, directions=directions)
        catalogue.work_out()
        with self._swapping:
            self._catalogue = catalogue
        return catalogue

    def read(
        self,
        item_ids: NDArray[np.object_],
        moment: datetime,
        *,
        scorer: Scorer,
        duty: float = 1.0,
    ) -> ItemSnapshot:
        """Read items past the cache, by id; those that the store does not know are left out.

        Args:
            item_ids: The ids.
            moment: As of when.
            scorer: Whose table their texts are looked up in.
            duty: Share of the time that this may work, in (0, 1]: between two chunks it sleeps.
        """
        item_ids = item_ids[ascending(item_ids)]
        chunks = []
        for start in range(0, max(len(item_ids), 1), _READ_ITEMS):
            before = time.perf_counter()
            chunks.append(self._read_chunk(item_ids[start : start + _READ_ITEMS], moment, scorer))
            if duty < 1:
                time.sleep((time.perf_counter() - before) * (1 / duty - 1))
        snapshot = concatenate(chunks)
        _log.debug("read %d items, %d of them known", len(item_ids), len(snapshot.item_ids))
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
        ).take(np.flatnonzero(features.found))
        if scorer.form is None:
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
    directions = unit_length(items.outputs.copy())
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
