"""Deep outputs that serving computed are there for the next request, and parity knows of them."""

import threading
import time
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest

from feature_repo.errors import StoreError
from serving.refresh import FreshOutputs, OutputRefresher, record_batch
from tests.waiting import wait_until


class Store:
    """Takes what is written; can be away, and can be held up."""

    def __init__(self) -> None:
        self.batches: list[pa.RecordBatch] = []
        self.open = threading.Event()
        self.open.set()
        self.away: type[Exception] | None = None

    def write(self, view: object, batch: pa.RecordBatch) -> int:
        assert self.open.wait(10)
        if self.away:
            raise self.away("away")
        self.batches.append(batch)
        return batch.num_rows


def outputs(user_id: str, key: int = 7) -> FreshOutputs:
    return FreshOutputs(user_id, np.arange(4, dtype=np.float32), key, 1_700_000_000, 1_600_000_000)


def wait_for(number: int, store: Store) -> None:
    wait_until(
        lambda: sum(batch.num_rows for batch in store.batches) >= number, most_s=10, poll_s=0.005
    )


def test_rows_as_export_writes_them() -> None:
    row = record_batch([outputs("ann")], "run-1").to_pylist()[0]
    moment = datetime(2020, 9, 13, 12, 26, 40, tzinfo=UTC)
    assert row == {
        "user_id": "ann",
        "embedding": [0, 1, 2, 3],
        "model_version": "run-1",
        "history_key": 7,
        "computed_time": 1_700_000_000,
        "event_timestamp": moment,
        "created_timestamp": moment,
    }


def test_a_batch_holds_every_user_once_with_the_last_outputs() -> None:
    store = Store()
    store.open.clear()
    refresher = OutputRefresher(store, "view", "run-1")  # type: ignore[arg-type]
    refresher.submit(outputs("first"))  # the thread takes it, and waits for the store
    time.sleep(0.4)
    for key in (1, 2):
        for user in ("ann", "bob"):
            refresher.submit(outputs(user, key))
    store.open.set()
    wait_for(3, store)
    assert [batch["user_id"].to_pylist() for batch in store.batches] == [["first"], ["ann", "bob"]]
    assert store.batches[1]["history_key"].to_pylist() == [2, 2]


@pytest.mark.parametrize("error", [StoreError, OSError])
def test_a_store_that_fails_costs_a_batch_and_no_more(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    monkeypatch.setattr("serving.refresh.RETRY_S", 0.05)
    store = Store()
    store.away = error
    refresher = OutputRefresher(store, "view", "run-1")  # type: ignore[arg-type]
    refresher.submit(outputs("lost"))
    time.sleep(0.4)
    store.away = None
    refresher.submit(outputs("kept"))
    wait_for(1, store)
    assert store.batches[0]["user_id"].to_pylist() == ["kept"]


def test_what_waits_at_the_stop_is_written() -> None:
    store = Store()
    refresher = OutputRefresher(store, "view", "run-1")  # type: ignore[arg-type]
    refresher.submit(outputs("ann"))
    refresher.stop()
    wait_for(1, store)
    refresher._thread.join(timeout=5)
    assert not refresher._thread.is_alive()
