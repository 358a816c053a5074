"""Bring the online rows of one feature view up to date, in windows that a kill does not undo.

What was copied is remembered in the home: the parts of the offline store, up to which event time,
and how many windows of rows were written. The online store holds the same number as a mark behind
the rows: where the mark is missing or older than the record, the store lost rows and is filled
again.
"""

import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain

import numpy as np
import pyarrow as pa
from feast import FeatureStore, FeatureView
from feast.feature_view import FeatureViewState
from pydantic import AwareDatetime, Field

from feature_repo.columns import check_columns
from feature_repo.errors import StoreError
from feature_repo.feast_bytes import VALUE_FIELDS
from feature_repo.fields import EVENT_TIMESTAMP
from feature_repo.manifest import Document
from feature_repo.moments import EPOCH, MICROSECOND, micros
from feature_repo.offline import OfflineStore
from feature_repo.online import OnlineWriter
from feature_repo.progress import Progress

logger = logging.getLogger(__name__)

BATCH_ROWS = 2000
"""Rows per write: 3 MB of 2 x 100 ids."""
WINDOW_ROWS = 50_000
"""Rows after which the record is written: what a kill makes the next run write again."""
_SWEEP_KEYS = 50_000
"""Online keys that are looked up offline at once; one lookup reads all keys of the view."""
_FOREVER = datetime(9999, 1, 1, tzinfo=UTC)


class Unfinished(Document):
    """A copy that was begun: the same rows come in the same order when it goes on."""

    parts: dict[str, list[int]]
    features: dict[str, str]
    start: AwareDatetime
    end: AwareDatetime
    whole: bool
    """All rows are copied, whatever is online; else what changed."""
    full: bool = False
    """A whole copy that was asked for, not one that had to be."""
    sweep: bool
    """Keys that are not offline may be online."""
    num_rows: int
    """Rows of the windows that are finished."""


class CopyState(Document):
    """How far a view was copied."""

    run: str
    """Changes with every whole copy."""
    num_windows: int
    """Windows that were finished since then."""
    parts: dict[str, list[int]] = Field(default_factory=dict)
    """Part of the offline store -> its identity, of the last finished copy."""
    features: dict[str, str] = Field(default_factory=dict)
    """Feature -> type, of the last finished copy."""
    end: AwareDatetime | None = None
    """Event time up to which the last finished copy went; None where the whole copy is not done."""
    unfinished: Unfinished | None = None

    @property
    def mark(self) -> str:
        """What lies online behind the rows."""
        return f"{self.run}:{self.num_windows}"


@dataclass(frozen=True)
class MaterializedView:
    """What was copied of a view.

    Args:
        name: The view.
        start: Oldest event time of the rows copied; None where nothing was new.
        num_rows: Rows copied by this run.
        num_removed: Keys that left the online store because they are gone offline, or expired.
        num_future: Keys with rows later than now, which were not copied.
        seconds: Wall-clock time.
    """

    name: str
    start: datetime | None
    num_rows: int
    num_removed: int
    num_future: int
    seconds: float


@dataclass
class ViewCopy:
    """Copies a view.

    Args:
        store: Feast's store.
        offline: Where the rows are.
        writer: Where they go.
        view: The view.
        end: When the copy began: later rows are not copied.
        now: The moment at which a request is answered; :attr:`end` for a replayed data set.
        num_workers: Threads that encode and write.
        save: Writes the state into the home.
        progress: Receives rows.
        batch_rows: Rows per write.
        window_rows: Rows after which the state is saved.
    """

    store: FeatureStore
    offline: OfflineStore
    writer: OnlineWriter
    view: FeatureView
    end: datetime
    now: Callable[[], datetime]
    num_workers: int
    save: Callable[[CopyState], None]
    progress: Progress
    batch_rows: int = BATCH_ROWS
    window_rows: int = WINDOW_ROWS
    num_rows: int = 0
    num_removed: int = 0
    start: datetime | None = None

    def run(self, state: CopyState | None, *, full: bool) -> MaterializedView:
        """Copy what is new since ``state``; everything where that is None or does not hold.

        Readers see every key all the time: rows are replaced one by one, and only then do those
        leave that are gone offline.

        Args:
            state: Of the last run.
            full: Copy everything; a run that was asked for this before and was killed goes on.

        Raises:
            StoreError: If a store fails, or all rows of the view are later than now.
        """
        began = time.perf_counter()
        name = self.view.name
        # Feast deletes the rows of a view that is removed, and knows of no copy when it comes back.
        if state is not None and state.end and not self.view.materialization_intervals:
            logger.warning("%s was removed and applied again: all rows are copied again", name)
            state = None
        if state is not None and not self._is_online(state):
            logger.warning("the online store lost rows of %s: all are copied again", name)
            state = None
        full = full and not (state and state.unfinished and state.unfinished.full)
        if full:
            # Nothing that is online is newer than now, or it would outlast the copy.
            self.writer.turn_back(self.view, to=self.end, now=self.now)
            state = None
        parts, features = self.offline.parts(name), self._features()
        open_copy = state.unfinished if state else None
        if state and open_copy and (open_copy.parts, open_copy.features) == (parts, features):
            state = self._copy(state, open_copy)
        num_future = 0
        if not parts:
            self._forget(state)
        elif open_copy := self._plan(state, parts, features, full=full):
            if state is None or open_copy.parts != state.parts:
                num_future, _ = self.offline.newest_rows(
                    name, start=self.end + MICROSECOND, end=_FOREVER, batch_rows=self.batch_rows
                )
            if open_copy.whole:
                state = CopyState(run=uuid.uuid4().hex, num_windows=0)
            assert state is not None
            state = state.model_copy(update={"unfinished": open_copy})
            self.save(state)
            self.writer.mark(name, state.mark)
            self._copy(state, open_copy)
        if num_future:
            logger.info("%d keys of %s have rows later than now: not copied", num_future, name)
        self._release()
        seconds = time.perf_counter() - began
        return MaterializedView(
            name, self.start, self.num_rows, self.num_removed, num_future, seconds
        )

    def _is_online(self, state: CopyState) -> bool:
        """Whether every server holds the windows that the state names."""
        marks = [mark.rpartition(":") for mark in self.writer.marks(self.view.name)]
        return all(
            run == state.run and int(number) >= state.num_windows for run, _, number in marks
        )

    def _features(self) -> dict[str, str]:
        return {field.name: str(field.dtype) for field in self.view.features}

    def _plan(
        self,
        state: CopyState | None,
        parts: dict[str, list[int]],
        features: dict[str, str],
        *,
        full: bool,
    ) -> Unfinished | None:
        """What is to copy; None where nothing can be new."""
        name = self.view.name
        kept = state and all(parts.get(part) == what for part, what in state.parts.items())
        if state and state.end and kept and features == state.features:
            start = state.end
            if added := parts.keys() - state.parts.keys():
                start = min(start, self.offline.first_event(name, added))
            if not added and start >= self.end:
                return None
            whole = sweep = False
        else:
            start = self.offline.first_event(name, parts)
            if start > self.end:
                raise StoreError(
                    f"{name} has only features from {start} on, after now ({self.end}); is the "
                    "clock right?"
                )
            whole = True
            # A store without a mark of ours is new: it holds nothing that could be gone offline.
            sweep = full or self.writer.marks(name) != {""}
        if self.view.ttl:
            start = max(start, self.end - self.view.ttl)
        return Unfinished(
            parts=parts, features=features, start=start, end=self.end, whole=whole, full=full,
            sweep=sweep, num_rows=0,
        )  # fmt: skip

    def _copy(self, state: CopyState, work: Unfinished) -> CopyState:
        """Write the rows that are left, remove what is gone, and record that it is done."""
        name = self.view.name
        num_keys, batches = self.offline.newest_rows(
            name, start=work.start, end=work.end, batch_rows=self.batch_rows
        )
        self.progress(work.num_rows, num_keys)
        for num_rows in self._write(skip_rows(batches, work.num_rows), work, num_keys):
            done = work.model_copy(update={"num_rows": work.num_rows + num_rows})
            update = {"num_windows": state.num_windows + 1, "unfinished": done}
            state = state.model_copy(update=update)
            self.writer.mark(name, state.mark)
            self.save(state)
        if work.sweep or self._expires(work):
            self.num_removed += self._sweep(work)
        if num_keys:
            self.start = min(self.start or work.start, work.start)
            self.store.registry.apply_materialization(
                self.view, self.store.project, work.start, work.end
            )
        update = {
            "parts": work.parts, "features": work.features, "end": work.end, "unfinished": None,
        }  # fmt: skip
        state = state.model_copy(update=update)
        self.save(state)
        return state

    def _write(
        self, batches: Iterator[pa.RecordBatch], work: Unfinished, num_keys: int
    ) -> Iterator[int]:
        """Write batches in threads; after each window how many rows were written so far."""
        until = work.end if work.whole else None
        pending: deque[Future[int]] = deque()
        num_rows = num_finished = 0
        pool = ThreadPoolExecutor(self.num_workers)
        try:
            for batch in chain(batches, [None]):
                if batch is not None:
                    pending.append(pool.submit(self._write_batch, batch, until))
                    num_rows += batch.num_rows
                is_window = batch is None or num_rows - num_finished >= self.window_rows
                while len(pending) > (0 if is_window else 2 * self.num_workers):
                    self.progress(pending.popleft().result(), num_keys)
                if is_window and num_rows > num_finished:
                    self.num_rows += num_rows - num_finished
                    num_finished = num_rows
                    yield num_rows
        finally:
            pool.shutdown(cancel_futures=True)

    def _write_batch(self, batch: pa.RecordBatch, until: datetime | None) -> int:
        kinds = {field.name: VALUE_FIELDS[field.dtype] for field in self.view.features}
        check_columns(self.view.name, kinds, batch.schema)
        self.writer.write(self.view, batch, until=until)
        return int(batch.num_rows)

    def _expires(self, work: Unfinished) -> bool:
        """Whether a row may be older than the view's time to live."""
        oldest = work.end - self.view.ttl if self.view.ttl else EPOCH
        return oldest > EPOCH and self.offline.first_event(self.view.name, work.parts) < oldest

    def _sweep(self, work: Unfinished) -> int:
        """Delete online rows whose key has no row offline that is not expired."""
        num_removed = 0
        moment = micros(work.end)
        for keys in self.writer.keys(self.view, _SWEEP_KEYS):
            if not len(keys):
                continue
            _, place = self.offline.latest_rows(
                self.view.name,
                keys=keys,
                times=np.full(len(keys), moment, dtype=np.int64),
                ttl=self.view.ttl or None,
                columns=[EVENT_TIMESTAMP],
            )
            gone = keys.filter(pa.array(place < 0))
            if len(gone):
                num_removed += self.writer.delete(self.view, gone, until=work.end)
        return num_removed

    def _forget(self, state: CopyState | None) -> None:
        """Remove the rows of a view that holds nothing any more."""
        if state is None or state.parts or state.unfinished:
            self.num_removed = self.writer.count(self.view)
            self.writer.clear(self.view)
            empty = CopyState(
                run=uuid.uuid4().hex, num_windows=0, features=self._features(), end=None
            )
            self.save(empty)
            self.writer.mark(self.view.name, empty.mark)

    def _release(self) -> None:
        """Free a view that a killed `feast materialize` left in the state "materializing"."""
        view = self.store.registry.get_feature_view(self.view.name, self.store.project)
        if view.state == FeatureViewState.MATERIALIZING:
            # The registry takes a view that differs in its state alone for unchanged; this
            # changes the state, too.
            self.store.registry.apply_materialization(view, self.store.project, self.end, self.end)


def skip_rows(batches: Iterator[pa.RecordBatch], num_rows: int) -> Iterator[pa.RecordBatch]:
    """The batches behind the first ``num_rows`` rows."""
    for batch in batches:
        if num_rows < batch.num_rows:
            yield batch.slice(num_rows)
        num_rows = max(num_rows - batch.num_rows, 0)
