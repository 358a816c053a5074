"""The log of served features: what rankings were computed from, to parquet, for a part of requests.

A request pays for a hash of its id and, if it is logged, for picking its best items; a thread of
its own does the rest. What that thread cannot keep up with is dropped and counted: serving never
waits for its log.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from feature_repo.artifact import ArtifactManifest
from feature_repo.behavior import hash63
from feature_repo.errors import LongtrailError
from feature_repo.features import UserFeatures
from feature_repo.served_files import write_served
from feature_repo.served_rows import ServedItems, ServedRequest, neighbor_hashes
from serving.answers import Ranking, Served
from serving.items import ItemSnapshot

MAX_ITEMS = 200
"""Logged items of a request: a whole catalogue's features are megabytes."""
_NUM_HASHES = 1 << 63

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Entry:
    """A request on its way to the thread: no more of it than is logged."""

    request_id: str
    served_at: datetime
    manifest: ArtifactManifest
    path: str
    degraded: tuple[str, ...]
    context: dict[str, float]
    users: UserFeatures
    num_scored: int
    num_returned: int
    items: ItemSnapshot
    logits: NDArray[np.float32]


class ServedLog:
    """Logs a part of the answered requests; one instance per process, safe for threads.

    A kill loses what was answered in the last ``flush_s`` seconds, and never leaves a broken file.

    Args:
        folder: :attr:`feature_repo.home.Home.served`.
        share: Part of the requests that is logged, in [0, 1]; the same ones wherever their ids are
            the same.
        max_queue: Requests that may wait for the thread, at least 1; up to 0.3 MB each.
        flush_rows: Requests after which a file is written, at least 1.
        flush_s: Seconds after which a file is written, above 0.
        max_items: Items logged of a request, the best ones, at least 1.
        clock: Tells when a request was answered, UTC.

    Raises:
        LongtrailError: If a number is out of its range.
    """

    def __init__(
        self,
        folder: Path,
        *,
        share: float,
        max_queue: int = 256,
        flush_rows: int = 1000,
        flush_s: float = 60.0,
        max_items: int = MAX_ITEMS,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        if not 0 <= share <= 1:
            raise LongtrailError(f"the share of logged requests must be in [0, 1], got {share}")
        sizes = {"max_queue": max_queue, "flush_rows": flush_rows, "max_items": max_items}
        for name, value in sizes.items():
            if value < 1:
                raise LongtrailError(f"{name} must be at least 1, got {value}")
        if not flush_s > 0:
            raise LongtrailError(f"flush_s must be above 0 seconds, got {flush_s}")
        self._folder = folder
        self._share = share
        self._flush_rows = flush_rows
        self._flush_s = flush_s
        self._max_items = max_items
        self._clock = clock
        self._queue: queue.Queue[_Entry | None] = queue.Queue(max_queue)
        self._lock = threading.Lock()
        self._is_closed = False
        self._has_told = False
        self.num_written = 0
        """Requests in complete files."""
        self.num_dropped = 0
        """Requests that came while the queue was full, or could not be written."""
        self._thread = threading.Thread(target=self._run, name="served-log", daemon=True)
        self._thread.start()

    def record(self, ranking: Ranking, context: Mapping[str, float], request_id: str) -> None:
        """Log an answer, if its id is among those that are logged; never waits, never raises.

        Answers that say nothing of what they were computed from (:attr:`Ranking.served`), as those
        for a history that might have been, are left out.

        Args:
            ranking: The answer.
            context: What the request itself told.
            request_id: Names the request; clicks name it too
                (:mod:`feature_repo.served_impressions`), so no two answers should share one.
        """
        served = ranking.served
        if served is None or self._is_closed or not self.wants(request_id):
            return
        try:
            self._queue.put_nowait(self._entry(ranking, served, context, request_id))
        except queue.Full:
            self._drop(1, "its queue is full")
        except Exception as error:  # noqa: BLE001  # logged and counted
            self._drop_unexpected(1, error)

    def wants(self, request_id: str) -> bool:
        """Whether requests of this id are logged."""
        return hash63(request_id) < self._share * _NUM_HASHES

    def close(self) -> None:
        """Write what waits and end the thread; what comes later is not logged."""
        self._is_closed = True
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _entry(
        self, ranking: Ranking, served: Served, context: Mapping[str, float], request_id: str
    ) -> _Entry:
        top = _best(served.logits, self._max_items)
        return _Entry(
            request_id=request_id,
            served_at=self._clock(),
            manifest=served.manifest,
            path=ranking.path,
            degraded=ranking.degraded,
            context=dict(context),
            users=served.users,
            num_scored=ranking.num_scored,
            num_returned=len(ranking.ranked),
            items=served.items.take(top),
            logits=served.logits[top],
        )

    def _run(self) -> None:
        """Gather rows until there are enough of them, or the first is old enough."""
        rows: list[ServedRequest] = []
        due = 0.0
        while True:
            try:
                wait_s = max(due - time.monotonic(), 0.0) if rows else None
                entry = self._queue.get(timeout=wait_s)
            except queue.Empty:
                self._write(rows)
                continue
            if entry is not None:
                if not rows:
                    due = time.monotonic() + self._flush_s
                self._append(rows, entry)
            if rows and (entry is None or len(rows) >= self._flush_rows):
                self._write(rows)
            if entry is None:
                return

    def _append(self, rows: list[ServedRequest], entry: _Entry) -> None:
        try:
            rows.append(_row(entry))
        except Exception as error:  # noqa: BLE001  # logged and counted
            self._drop_unexpected(1, error)

    def _write(self, rows: list[ServedRequest]) -> None:
        """Write the rows and forget them, also where the disk does not take them."""
        try:
            write_served(self._folder, rows)
            self.num_written += len(rows)
        except OSError as error:
            self._drop(len(rows), f"{self._folder} cannot be written: {error}")
        except Exception as error:  # noqa: BLE001  # logged and counted
            self._drop_unexpected(len(rows), error)
        rows.clear()

    def _drop_unexpected(self, number: int, error: Exception) -> None:
        """Go on after a defect: the thread that ends here would leave the log full for good."""
        if not self._has_told:
            self._has_told = True
            _log.error("requests cannot be logged: this is a defect", exc_info=error)
        self._drop(number, f"unexpected {type(error).__name__}: {error}")

    def _drop(self, number: int, reason: str) -> None:
        with self._lock:
            self.num_dropped += number
            total = self.num_dropped
        _log.warning(
            "the log of served features lost %d requests, %d in all: %s", number, total, reason
        )


def _best(logits: NDArray[np.float32], number: int) -> NDArray[np.intp]:
    """Rows of the highest logits, best first; of equal ones the first; those of NaN left out."""
    rows = np.flatnonzero(~np.isnan(logits))
    if len(rows) > number:
        # All that reach the last one's logit: which of equal ones stay is for the sort to say.
        least = np.partition(logits[rows], len(rows) - number)[len(rows) - number]
        rows = rows[logits[rows] >= least]
    return rows[np.argsort(-logits[rows], kind="stable")][:number]


def _row(entry: _Entry) -> ServedRequest:
    manifest, inputs = entry.manifest, entry.items.inputs
    return ServedRequest(
        request_id=entry.request_id,
        served_at=entry.served_at,
        items_at=entry.items.at,
        run=manifest.run,
        encoder=manifest.encoder_fingerprint,
        path=entry.path,
        degraded=entry.degraded,
        context=entry.context,
        user=entry.users,
        num_scored=entry.num_scored,
        num_returned=entry.num_returned,
        items=ServedItems(
            item_ids=entry.items.item_ids,
            logits=entry.logits,
            text_ids=entry.items.text_ids,
            dense=inputs.candidate_dense,
            dense_names=manifest.item_dense_names,
            categories=inputs.candidate_categories.astype(np.int32),
            category_names=tuple(manifest.category_vocabularies),
            neighbors=neighbor_hashes(inputs.neighbor_keys, inputs.neighbor_weights),
        ),
    )
