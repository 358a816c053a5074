"""Deep outputs that a request computed anew, written back to the online store for the next one.

A user's deep outputs are a feature that ``longtrail export`` writes. When the history changes, or
an age crosses a step, the first request computes them and this writes them back, so that requests
of every process find them. They say themselves what they are of, so it does not matter who writes
last.

Shapes: B = users of a batch, W = numbers of a user's deep outputs.
"""

import logging
import queue
import threading
import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from feast.errors import FeastObjectNotFoundException
from numpy.typing import NDArray

from feature_repo.errors import StoreError
from feature_repo.home import Home
from feature_repo.online import OnlineWriter, open_writer
from feature_repo.profiles import open_store
from feature_repo.run_rows import run_rows
from feature_repo.version_names import run_view

MAX_WAITING = 10_000
"""Users in line; who comes beyond it is not written back, and computed again when asked for."""
BATCH_USERS = 500
BATCH_S = 0.2
RETRY_S = 5.0
"""Pause after a store did not take a batch, which is then dropped."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FreshOutputs:
    """One user's deep outputs.

    Args:
        user_id: Whose.
        vector: float32 [W].
        history_key: Of the behaviours that they are of.
        computed_at: Moment that ages refer to, epoch seconds.
        newest: Time of the newest behaviour, or of the request without any, epoch seconds.
    """

    user_id: str
    vector: NDArray[np.float32]
    history_key: int
    computed_at: int
    newest: int


class OutputRefresher:
    """Writes deep outputs back in a thread of its own; safe for threads.

    Args:
        writer: The online store.
        view: Feast's view of the run's users.
        run: Name of the run.
    """

    def __init__(self, writer: OnlineWriter, view: object, run: str) -> None:
        self._writer = writer
        self._view = view
        self._run = run
        self._waiting: queue.SimpleQueue[FreshOutputs | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="write-back", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, home: Home, profile: str, run: str) -> "OutputRefresher | None":
        """Open the online store of a profile; None where the run's outputs are not exported."""
        store = open_store(home, profile)
        try:
            view = store.get_feature_view(run_view("user", run))
        except FeastObjectNotFoundException:
            return None
        return cls(open_writer(store), view, run)

    def submit(self, outputs: FreshOutputs) -> None:
        """Write these when there is time; at once for the caller."""
        if self._waiting.qsize() < MAX_WAITING:
            self._waiting.put(outputs)

    def stop(self) -> None:
        """End the thread after what waits is written; does not wait for that."""
        self._waiting.put(None)

    def _work(self) -> None:
        is_open = True
        while is_open:
            first = self._waiting.get()
            batch = [] if first is None else [first]
            is_open = first is not None
            end = time.monotonic() + BATCH_S
            while is_open and len(batch) < BATCH_USERS:
                try:
                    entry = self._waiting.get(timeout=max(0.0, end - time.monotonic()))
                except queue.Empty:
                    break
                is_open = entry is not None
                if entry is not None:
                    batch.append(entry)
            if batch:
                self._write(batch)

    def _write(self, batch: list[FreshOutputs]) -> None:
        newest = {entry.user_id: entry for entry in batch}  # a key once: the last one counts
        try:
            self._writer.write(self._view, record_batch(list(newest.values()), self._run))
        # Of whatever kind: a thread that ends writes nothing any more.
        except Exception as error:  # noqa: BLE001
            defect = None if isinstance(error, StoreError) else error
            _log.warning(
                "deep outputs of %d users were not written back: %s",
                len(newest),
                error,
                exc_info=defect,
            )
            time.sleep(RETRY_S)


def record_batch(entries: list[FreshOutputs], run: str) -> pa.RecordBatch:
    """Rows of the view of a run's users, as export writes them."""
    table = run_rows(
        "user",
        [entry.user_id for entry in entries],
        np.stack([entry.vector for entry in entries]),
        run=run,
        times=np.array([entry.newest for entry in entries]) * 1_000_000,
        origin={
            "history_key": np.array([entry.history_key for entry in entries]),
            "computed_time": np.array([entry.computed_at for entry in entries]),
        },
    )
    (batch,) = table.to_batches()
    return batch
