"""The circuit breaker around the online store: states, threads, and a Redis that comes and goes."""

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from feature_repo.errors import LongtrailError, StoreError
from feature_repo.features import ItemFeatures, UserFeatures
from feature_repo.redis_lookup import READ_TIMEOUT_S, RedisLookup
from feature_repo.services.processes import free_port
from feature_repo.services.redis import RedisServer
from serving.breaker import BreakerReader, CircuitOpenError
from tests.feature_repo.online_stores import make_store, make_view, redis_config
from tests.servers import scratch_folder
from tests.serving.conftest import ITEMS, USERS, ToyReader

RESET_S = 0.5
ANN = np.array(["ann"], dtype=object)


class MoodyReader(ToyReader):
    """Does ``mood`` before it reads."""

    def __init__(self) -> None:
        super().__init__(USERS, ITEMS)
        self.mood: Callable[[], object] = int
        self.num_calls = 0

    def online_users(
        self, user_ids: NDArray[np.object_], *, at: datetime | None = None
    ) -> UserFeatures:
        self.num_calls += 1
        self.mood()
        return super().online_users(user_ids, at=at)

    def online_items(
        self, item_ids: NDArray[np.object_], *, at: datetime | None = None
    ) -> ItemFeatures:
        self.num_calls += 1
        self.mood()
        return super().online_items(item_ids, at=at)


def away() -> None:
    raise StoreError("Redis at 127.0.0.1:1 does not answer")


@pytest.fixture
def reader() -> MoodyReader:
    return MoodyReader()


def breaker(reader: Any, **changes: Any) -> BreakerReader:
    return BreakerReader(reader, **{"fail_max": 3, "reset_s": RESET_S, "slow_s": 0.05} | changes)


def fail(guarded: BreakerReader, times: int = 1) -> None:
    for _ in range(times):
        with pytest.raises(StoreError):
            guarded.online_users(ANN)


def test_closed_it_is_the_reader(reader: MoodyReader) -> None:
    guarded = breaker(reader)
    assert guarded.online_users(ANN).found.tolist() == [True]
    items = guarded.online_items(np.array(["L1", "no"], dtype=object))
    assert items.found.tolist() == [True, False]
    assert (guarded.state, guarded.num_failures, guarded.num_opened) == ("closed", 0, 0)


def test_failures_in_a_row_open_it_then_nobody_asks_until_one_tries(reader: MoodyReader) -> None:
    guarded = breaker(reader)
    reader.mood = away
    fail(guarded, 2)
    reader.mood = int
    guarded.online_users(ANN)  # a success in between: counted from the beginning
    reader.mood = away
    fail(guarded, 3)
    assert (guarded.state, guarded.num_failures, guarded.num_opened) == ("open", 5, 1)
    asked = reader.num_calls
    with pytest.raises(
        CircuitOpenError, match=r"127.0.0.1:1 .* tried again in 0\.[1-5] s"
    ) as error:
        guarded.online_items(ANN)
    assert 0 < error.value.retry_after_s <= RESET_S
    fail(guarded, 20)
    assert reader.num_calls == asked
    # The try fails: as long again; it is the same outage.
    time.sleep(RESET_S)
    fail(guarded, 3)
    assert reader.num_calls == asked + 1
    assert (guarded.state, guarded.num_failures, guarded.num_opened) == ("open", 6, 1)
    time.sleep(RESET_S)
    reader.mood = int
    assert guarded.online_users(ANN).found.tolist() == [True]
    assert guarded.state == "closed"
    reader.mood = away
    fail(guarded, 2)
    assert guarded.state == "closed"
    fail(guarded)
    assert (guarded.state, guarded.num_opened) == ("open", 2)


def test_a_slow_answer_is_given_and_counts_as_a_failure(reader: MoodyReader) -> None:
    guarded = breaker(reader, slow_s=0.02)
    reader.mood = lambda: time.sleep(0.03)
    for _ in range(3):
        assert guarded.online_users(ANN).found.tolist() == [True]
    assert (guarded.state, guarded.num_failures) == ("open", 3)
    with pytest.raises(CircuitOpenError, match=r"took 0\.0\d s to answer; the store is tried"):
        guarded.online_users(ANN)


def test_items_are_read_in_bulk_and_may_take_their_time(reader: MoodyReader) -> None:
    guarded = breaker(reader, slow_s=0.02, fail_max=1)
    reader.mood = lambda: time.sleep(0.03)
    states = []
    for read in (guarded.online_items, guarded.online_users):
        read(ANN)
        states.append(guarded.state)
    assert states == ["closed", "open"]


def test_other_errors_pass_and_do_not_count(reader: MoodyReader) -> None:
    def naive() -> None:
        raise ValueError("at must have a time zone")

    guarded = breaker(reader)
    reader.mood = naive
    for _ in range(5):
        with pytest.raises(ValueError, match="time zone"):
            guarded.online_users(ANN)
    assert (guarded.state, guarded.num_failures) == ("closed", 0)


def test_calls_run_side_by_side_and_one_alone_tries_a_store_that_failed(
    reader: MoodyReader,
) -> None:
    guarded = breaker(reader, slow_s=5.0)
    together = threading.Barrier(4, timeout=5)
    reader.mood = together.wait  # nobody passes unless four are inside at once
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: guarded.online_users(ANN), range(4)))
    assert all(answer.found[0] for answer in answers)

    reader.mood = away
    fail(guarded, 3)
    time.sleep(RESET_S)
    inside, leave = threading.Event(), threading.Event()

    def hang() -> None:
        inside.set()
        leave.wait(5)

    reader.mood = hang
    asked = reader.num_calls
    with ThreadPoolExecutor(1) as pool:
        tried = pool.submit(guarded.online_users, ANN)
        assert inside.wait(5)
        meanwhile = guarded.state
        began = time.perf_counter()
        fail(guarded, 10)  # of those that come meanwhile none waits
        assert time.perf_counter() - began < 1
        leave.set()
        assert tried.result(5).found[0]
    assert reader.num_calls == asked + 1
    assert (meanwhile, guarded.state) == ("half-open", "closed")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"fail_max": 0}, "fail_max must be at least 1, got 0"),
        ({"reset_s": 0.0}, "reset_s must be above 0 seconds, got 0.0"),
        ({"slow_s": float("nan")}, "slow_s must be above 0 seconds, got nan"),
    ],
)
def test_numbers_out_of_range_are_refused(
    reader: MoodyReader, wrong: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(LongtrailError, match=sentence):
        breaker(reader, **wrong)


@pytest.fixture
def own_redis(_ends_in_order: None) -> Iterator[RedisServer]:
    """A server that the test may stop and kill."""
    folder = scratch_folder()
    server = RedisServer(folder / "redis", free_port(), "")
    server.start()
    yield server
    if (process := server.process()) is not None:
        process.send_signal(signal.SIGCONT)
    server.stop()
    shutil.rmtree(folder)


def test_a_redis_that_hangs_or_dies_costs_little_and_comes_back_by_itself(
    own_redis: RedisServer, tmp_path: Path
) -> None:
    view = make_view(tmp_path, "stats", features=["count"])
    store = make_store(tmp_path, redis_config(own_redis.connection_string), [view])
    lookup = RedisLookup(store, [(view, ["count"])])
    guarded = breaker(ToyReader(USERS, ITEMS), slow_s=1.0)

    def read() -> float:
        """Seconds that a lookup takes."""
        began = time.perf_counter()
        guarded.guard(lambda: lookup.read(["1"]))
        return time.perf_counter() - began

    def recovers() -> None:
        deadline = time.monotonic() + 10
        while guarded.state != "closed":
            assert time.monotonic() < deadline
            try:
                read()
            except StoreError:
                time.sleep(0.02)
        read()

    def opens(sentence: str, most_s: float) -> None:
        for _ in range(3):
            began = time.perf_counter()
            with pytest.raises(StoreError, match=sentence):
                read()
            assert time.perf_counter() - began < most_s
        assert guarded.state == "open"
        took = []
        for _ in range(5):
            began = time.perf_counter()
            with pytest.raises(CircuitOpenError):
                read()
            took.append(time.perf_counter() - began)
        assert min(took) < 0.05  # the best of five: the machine may be busy

    read()
    process = own_redis.process()
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    opens("does not answer as it should", READ_TIMEOUT_S * 2 + 1)
    process.send_signal(signal.SIGCONT)
    recovers()
    process.kill()
    process.wait()
    opens("does not answer as it should", 1)
    own_redis.start()
    recovers()
    assert guarded.num_opened == 2
