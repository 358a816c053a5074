"""What is offline comes online: once, completely, through kills and losses; what is gone leaves."""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from feast import FeatureStore
from feast.feature_view import FeatureViewState

from feature_repo.errors import StoreError
from feature_repo.offline import open_offline
from feature_repo.online import OnlineWriter, open_writer
from feature_repo.online_copy import CopyState, MaterializedView, ViewCopy
from feature_repo.progress import silent
from feature_repo.services.processes import free_port
from feature_repo.services.redis import RedisServer
from tests.feature_repo.online_stores import (
    FOREVER,
    make_batch,
    make_store,
    make_view,
    redis_config,
    write_part,
)
from tests.forked import run_forked

DAY = timedelta(days=1)
START = datetime(2024, 1, 1, tzinfo=UTC)
NOW = START + 10 * DAY


class World:
    """A view of one number per user: files in a folder, an online store, what was copied."""

    def __init__(self, folder: Path, online: dict[str, Any], ttl: timedelta = FOREVER) -> None:
        self.folder = folder
        view = make_view(folder, "counts", features=["count"], ttl=ttl)
        self.store: FeatureStore = make_store(folder, online, [view])
        self.view = self.store.get_feature_view("counts")
        self.saved = folder / "state.json"
        self.writer: OnlineWriter = open_writer(self.store)

    def part(self, name: str, rows: dict[str, tuple[datetime, int]]) -> None:
        times, values = zip(*rows.values(), strict=True)
        write_part(self.folder, "counts", name, make_batch(list(rows), times, {"count": values}))

    def state(self) -> CopyState | None:
        return CopyState.load(self.saved, made_by="") if self.saved.exists() else None

    def copy(
        self,
        *,
        now: datetime = NOW,
        full: bool = False,
        save: Callable[[CopyState], None] | None = None,
        writer: OnlineWriter | None = None,
        progress: Any = silent,
    ) -> MaterializedView:
        copy = ViewCopy(
            self.store,
            open_offline(self.store),
            writer or self.writer,
            self.store.get_feature_view("counts"),  # with the copies that Feast knows of
            now,
            lambda: now,
            num_workers=2,
            save=save or (lambda state: state.save(self.saved)),
            progress=progress,
            batch_rows=3,
            window_rows=6,
        )
        return copy.run(self.state(), full=full)

    def read(self, users: Sequence[str]) -> list[int | None]:
        rows = [{"user_id": user} for user in users]
        found = self.store.get_online_features(features=["counts:count"], entity_rows=rows)
        return list(found.to_dict()["count"])


def users(*numbers: int, day: int = 1, value: int = 0) -> dict[str, tuple[datetime, int]]:
    return {f"u{n:02d}": (START + day * DAY, value + n) for n in numbers}


def names(*numbers: int) -> list[str]:
    return [f"u{n:02d}" for n in numbers]


@pytest.fixture(params=["redis", "sqlite"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    if request.param == "sqlite":
        return World(tmp_path, {"type": "sqlite", "path": str(tmp_path / "online.db")})
    request.getfixturevalue("redis_url")
    server = request.getfixturevalue("redis_server")
    return World(tmp_path, redis_config(server.connection_string))


@pytest.fixture
def redis_world(redis_url: str, redis_server: RedisServer, tmp_path: Path) -> World:
    return World(tmp_path, redis_config(redis_server.connection_string))


def test_only_what_is_new_is_copied(world: World) -> None:
    world.part("a", users(*range(20)))
    first = world.copy()
    assert (first.num_rows, first.start) == (20, START + DAY)
    assert world.read(names(*range(20))) == list(range(20))
    again = world.copy()
    assert (again.num_rows, again.start) == (0, None)
    world.part("b", {**users(3, day=5, value=100), **users(4, day=0, value=100)})  # one is late
    world.part("c", users(30, day=2))
    assert world.copy().num_rows > 0
    assert world.read(names(3, 4, 30)) == [103, 4, 30]


def test_rows_between_two_runs_of_an_unchanged_part_are_copied(world: World) -> None:
    world.part("a", {**users(1, day=1), **users(2, day=12), **users(3, day=14)})
    first = world.copy()
    assert (first.num_rows, first.num_future) == (1, 2)
    assert world.read(names(1, 2, 3)) == [1, None, None]
    later = world.copy(now=NOW + 3 * DAY)
    assert later.num_rows == 1
    assert world.read(names(1, 2, 3)) == [1, 2, None]


def test_a_view_of_the_future_alone_is_refused(world: World) -> None:
    world.part("a", users(1, day=11))
    with pytest.raises(StoreError, match="is the clock right"):
        world.copy()


def test_a_corrected_row_of_equal_time_arrives(world: World) -> None:
    world.part("a", users(1, 2))
    world.copy()
    world.part("a", users(1, 2, value=50))
    world.copy()
    assert world.read(names(1, 2)) == [51, 52]


def test_what_is_gone_offline_leaves(world: World) -> None:
    world.part("a", users(1, 2, 3, day=4))
    world.part("b", users(4, 5))
    world.copy()
    world.part("a", users(1, 2))  # user 3 is deleted; of users 1 and 2 the newest row
    done = world.copy()
    assert done.num_removed == 1
    assert world.read(names(1, 2, 3, 4, 5)) == [1, 2, None, 4, 5]
    for file in (world.folder / "counts").glob("*.parquet"):
        file.unlink()
    assert world.copy().num_removed == 4
    assert world.writer.count(world.view) == 0
    world.part("a", users(2))
    assert world.copy().num_rows == 1
    assert world.read(names(2)) == [2]


def test_expired_rows_leave(redis_url: str, redis_server: RedisServer, tmp_path: Path) -> None:
    config = redis_config(redis_server.connection_string)
    world = World(tmp_path, config, ttl=5 * DAY)
    world.part("a", {**users(1, day=6), **users(2, day=8), **users(3, day=1)})
    assert world.copy().num_rows == 2  # that of user 3 was too old already
    assert world.copy(now=NOW + 2 * DAY).num_removed == 1
    assert world.read(names(1, 2, 3)) == [None, 2, None]


def test_full_leaves_what_is_offline_and_nothing_else(world: World) -> None:
    world.part("a", users(1, 2))
    world.copy()
    times = [NOW + DAY, NOW + DAY, START]
    stale = make_batch(["u02", "u99", "u98"], times, {"count": [100] * 3})
    world.writer.write(world.view, stale)
    done = world.copy(full=True)
    assert (done.num_rows, done.num_removed) == (2, 2)
    assert world.writer.count(world.view) == 2
    assert world.read(names(1, 2, 98, 99)) == [1, 2, None, None]


def test_a_reader_never_misses_a_key_while_all_are_copied_again(world: World) -> None:
    everyone = names(*range(40))
    world.part("a", users(*range(41)))
    world.copy()
    world.part("a", users(*range(40), value=100))
    seen = []

    def look(*_: object, **_figures: float) -> None:
        """Called after every write, in the midst of the copy."""
        seen.append([value for value in world.read(everyone) if value is not None])

    stop = threading.Event()

    def poll() -> None:
        while not stop.is_set():
            look()

    poller = threading.Thread(target=poll)
    if world.store.config.online_store.type == "redis":  # SQLite has one writer and its readers
        poller.start()
    try:
        world.copy(full=True, progress=look)
    finally:
        stop.set()
        if poller.is_alive():
            poller.join()
    assert {len(values) for values in seen} == {40}
    assert len({sum(value >= 100 for value in values) for values in seen}) > 3  # row by row
    look()
    assert min(seen[-1]) >= 100
    assert world.read(names(40)) == [None]


def test_a_push_while_all_are_copied_again_stays(redis_world: World) -> None:
    redis_world.part("a", users(*range(8)))
    redis_world.copy()
    pushed = make_batch(["u00", "u07", "new"], [NOW + DAY] * 3, {"count": [100, 200, 300]})

    def push(advance: int, _total: int, **_figures: float) -> None:
        if not advance:  # the copy begins
            redis_world.writer.write(redis_world.view, pushed)

    redis_world.copy(full=True, progress=push)
    assert redis_world.read(["u00", "u01", "u07", "new"]) == [100, 1, 200, 300]


def test_a_killed_full_run_goes_on_when_asked_again(world: World) -> None:
    world.part("a", users(*range(20)))
    world.copy()

    def killed(state: CopyState) -> None:
        state.save(world.saved)
        if state.num_windows == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.copy(full=True, save=killed)
    assert world.copy(full=True).num_rows == 8
    assert world.copy(full=True).num_rows == 20
    with pytest.raises(KeyboardInterrupt):
        world.copy(full=True, save=killed)
    world.part("a", users(*range(1, 20), value=7))
    assert world.copy(full=True).num_rows == 19
    assert world.read(names(0, *range(1, 20))) == [None, *range(8, 27)]


def test_a_killed_run_goes_on_behind_its_last_window(world: World) -> None:
    world.part("a", users(*range(20)))
    saved = []

    def killed(state: CopyState) -> None:
        state.save(world.saved)
        saved.append(state)
        if state.num_windows == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.copy(save=killed)
    assert saved[-1].unfinished is not None
    assert saved[-1].unfinished.num_rows == 12
    assert world.copy().num_rows == 8
    assert world.read(names(*range(20))) == list(range(20))
    assert world.copy().num_rows == 0


def killed_copy(folder: Path, connection: str) -> None:
    """A copy that ends itself with SIGKILL after its first window."""
    world = World(folder, redis_config(connection))

    def save(state: CopyState) -> None:
        state.save(world.saved)
        if state.num_windows == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with world.writer.hold("home"):
        world.copy(save=save)


def test_a_process_killed_by_the_system_goes_on(
    redis_world: World, redis_server: RedisServer, fork_server: None
) -> None:
    """Its lock in Redis stays behind; who holds the home takes it over."""
    redis_world.part("a", users(*range(20)))
    folder = redis_world.folder
    connection = redis_server.connection_string
    killed = run_forked(killed_copy, folder, connection, output=folder / "said")
    assert killed.code == -signal.SIGKILL, killed.said
    state = redis_world.state()
    assert state is not None
    assert state.unfinished is not None
    with pytest.raises(StoreError, match="is copying"):
        redis_world.writer.hold("another").__enter__()
    with redis_world.writer.hold("home"):
        assert redis_world.copy().num_rows == 14
    assert redis_world.read(names(*range(20))) == list(range(20))


def test_a_killed_run_starts_again_where_its_rows_changed(world: World) -> None:
    world.part("a", users(*range(20)))

    def killed(state: CopyState) -> None:
        state.save(world.saved)
        if state.num_windows == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.copy(save=killed)
    world.part("a", users(*range(1, 20), value=7))
    assert world.copy().num_rows == 19
    assert world.read(names(0, *range(1, 20))) == [None, *range(8, 27)]


def test_a_store_that_lost_its_rows_is_filled_again(
    redis_world: World, redis_server: RedisServer
) -> None:
    redis_world.part("a", users(*range(8)))
    redis_world.copy()
    with redis.Redis(port=redis_server.port) as client:
        client.flushall()
    assert redis_world.copy().num_rows == 8
    assert redis_world.read(names(0, 7)) == [0, 7]
    # Its disk kept the first windows only: the mark is older than the record.
    state = redis_world.state()
    assert state is not None
    redis_world.writer.mark("counts", f"{state.run}:{state.num_windows - 1}")
    assert redis_world.copy().num_rows == 8


def test_a_server_killed_midway(scratch: Path, tmp_path: Path) -> None:
    server = RedisServer(scratch / "redis", free_port(), "")
    server.start()
    world = World(tmp_path, redis_config(server.connection_string))
    world.part("a", users(*range(40)))

    def kill(advance: int, total: int, **_figures: float) -> None:
        if advance:
            process = server.process()
            if process is not None:
                process.kill()
                process.wait()

    try:
        with pytest.raises(StoreError, match="check that it runs"):
            world.copy(progress=kill)
        state = world.state()
        assert state is not None
        assert state.end is None
        server.start()
        world.copy()
        assert world.read(names(*range(40))) == list(range(40))
    finally:
        server.stop()


def test_a_full_server_marks_nothing_as_done(redis_world: World, redis_server: RedisServer) -> None:
    redis_world.part("a", users(*range(8)))
    with redis.Redis(port=redis_server.port) as client:
        client.config_set("maxmemory", "1")
        try:
            with pytest.raises(StoreError, match="is full"):
                redis_world.copy()
        finally:
            client.config_set("maxmemory", "0")
    assert redis_world.copy().num_rows == 8
    assert redis_world.read(names(0, 7)) == [0, 7]


def test_a_push_during_a_whole_copy_survives(redis_world: World) -> None:
    redis_world.part("a", users(*range(8)))
    redis_world.copy()
    pushed = make_batch(["u00", "new"], [NOW + DAY] * 2, {"count": [1000, 2000]})
    redis_world.writer.write(redis_world.view, pushed)
    redis_world.part("a", users(*range(8), value=5))
    redis_world.copy()
    assert redis_world.read(["u00", "u01", "new"]) == [1000, 6, 2000]


def test_a_view_does_not_stay_materializing(world: World) -> None:
    world.part("a", users(1))
    world.copy()
    stuck = world.store.get_feature_view("counts")
    stuck.state = FeatureViewState.MATERIALIZING  # what a killed `feast materialize` leaves
    stuck.materialization_intervals = []  # or the registry would see no change
    world.store.registry.apply_feature_view(stuck, world.store.project)
    assert world.store.get_feature_view("counts").state == FeatureViewState.MATERIALIZING
    world.copy()
    assert world.store.get_feature_view("counts").state == FeatureViewState.AVAILABLE_ONLINE


def test_a_new_feature_is_copied_for_every_key(redis_url: str, redis_server: RedisServer,
    tmp_path: Path) -> None:  # fmt: skip
    config = redis_config(redis_server.connection_string)
    world = World(tmp_path, config)
    columns: dict[str, list[Any]] = {"count": [1, 2], "brand": ["x", "y"]}
    batch = make_batch(["u01", "u02"], [START] * 2, columns)
    write_part(tmp_path, "counts", "a", batch)
    world.copy()
    wider = make_view(tmp_path, "counts", features=["count", "brand"])
    world.store.apply([wider])
    world.view = world.store.get_feature_view("counts")
    assert world.copy().num_rows == 2
    rows = [{"user_id": "u01"}, {"user_id": "u02"}]
    found = world.store.get_online_features(features=["counts:brand"], entity_rows=rows)
    assert found.to_dict()["brand"] == ["x", "y"]
