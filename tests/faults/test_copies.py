"""Copies to the online store that meet another copy, a full Redis, other columns, another clock."""

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import redis

from feature_repo.errors import StoreError
from feature_repo.feast_bytes import feature_field
from feature_repo.home import Home
from feature_repo.materialize import Materialized
from feature_repo.reader import FeatureReader
from tests.faults.commands import Stop
from tests.faults.test_servers_away import USERS, use
from tests.faults.world import START, TIME, TOML, Stage, World, differences
from tests.feature_repo.test_reader import assert_equal

pytestmark = pytest.mark.timeout(900)  # with the world's own setup, on a busy machine

ITEMS = ["i0", "i7", "nothing", "i39"]


def test_of_two_copies_at_once_one_is_refused(world: World) -> None:
    middle = world.snapshots["materialize"].events["call"] // 2
    with world.stage("apply") as stage:
        first = stage.start(world.steps["materialize"], stop=Stop("call", middle))
        first.wait_for_stop()
        second = stage.run(world.steps["materialize"])
        assert "another process is writing online-production" in second.sentence
        # Another machine has a home of its own and the same servers.
        elsewhere = stage.home.root.with_name("elsewhere")
        shutil.copytree(stage.home.root, elsewhere)
        try:
            other = Stage(Home(elsewhere), stage.servers, stage.database, stage.said)
            third = other.run(world.steps["materialize"])
            assert "is copying to this Redis" in third.sentence
        finally:
            shutil.rmtree(elsewhere)
        first.go_on()
        assert first.end().code == 0
        assert differences(stage.contents(), world.expected("materialize")) == []


def test_a_full_redis_is_said_and_nothing_counts_as_copied(world: World) -> None:
    with (
        world.stage("apply") as stage,
        redis.Redis(port=world.servers.redis.port) as client,
    ):
        used: int = client.info("memory")["used_memory"]
        client.config_set("maxmemory", used + 300_000)
        try:
            done = stage.run(world.steps["materialize"])
        finally:
            client.config_set("maxmemory", 0)
        assert "is full (maxmemory)" in done.sentence
        record = Materialized.load(stage.home.materialized("production"), made_by="a test")
        # A view counts as copied only where all its rows are there.
        copied = {name for name, state in record.views.items() if state.end}
        assert record.views.keys() - copied
        now, later = (
            num_rows(world.servers.hashes()),
            num_rows(world.snapshots["materialize"].hashes),
        )
        assert {name for name in later if now[name] == later[name]} == copied
        assert stage.run(world.steps["materialize"]).code == 0
        assert differences(stage.contents(), world.expected("materialize")) == []


def test_a_redis_that_evicts_is_said_and_everything_is_copied_again(world: World) -> None:
    expected = world.expected("materialize")
    with (
        world.stage("apply") as stage,
        redis.Redis(port=world.servers.redis.port) as client,
    ):
        with evicting(client, room=300_000):
            done = stage.run(world.steps["materialize"])
        assert "threw features away while they were copied" in done.sentence
        now, whole = world.servers.hashes(), world.snapshots["materialize"].hashes
        assert {key for key in whole if key not in now and not key.startswith(b"longtrail:")}
        again = stage.run(world.steps["materialize"])
        assert "all views are copied again" in again.stderr
        assert again.code == 0
        assert differences(stage.contents(), expected) == []
        # Between two copies nobody else would notice.
        with evicting(client, room=-50_000):
            client.set("of another", "x")
        assert differences(stage.contents(), expected)
        assert "all views are copied again" in stage.run(world.steps["materialize"]).stderr
        assert differences(stage.contents(), expected) == []
        assert "copied again" not in stage.run(world.steps["materialize"]).stderr


@contextmanager
def evicting(client: redis.Redis, *, room: int) -> Iterator[None]:
    """Redis throws keys away to stay within so many bytes more than it uses now."""
    client.config_set("maxmemory-policy", "allkeys-lru")
    client.config_set("maxmemory", client.info("memory")["used_memory"] + room)
    try:
        yield
    finally:
        client.config_set("maxmemory", 0)
        client.config_set("maxmemory-policy", "noeviction")


def num_rows(hashes: dict[bytes, dict[bytes, bytes]]) -> Counter[str]:
    """View -> rows online."""
    fields = (field for values in hashes.values() for field in values)
    return Counter(f.decode().removeprefix("_ts:") for f in fields if f.startswith(b"_ts:"))


def test_a_view_with_other_columns_is_refused_then_migrated(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One column comes, one goes, one gets another type."""
    toml = world.root / "data" / "other-columns.toml"
    was = "SELECT item_id, text, price, shelf"
    assert was in TOML
    toml.write_text(
        TOML.replace(was, "SELECT item_id, text, 'costs ' || price AS price, 2 * price AS weight"),
        encoding="utf-8",
    )
    with world.stage("materialize") as stage:
        use(stage, monkeypatch)
        before = FeatureReader(stage.home, "production")
        expected = before.online_items(ITEMS)
        assert stage.run(["ingest", str(toml)]).code == 0
        assert stage.run(world.steps["sequences"]).code == 0
        # Built, but not applied: neither read nor copied.
        times = before.request_times(len(ITEMS))
        with pytest.raises(StoreError, match="longtrail apply"):
            before.historical_items(ITEMS, times)
        assert "longtrail apply" in stage.run(["materialize"]).sentence
        assert_equal(before.online_items(ITEMS), expected)
        # Applied, but not copied: what is online of the old type is missing.
        assert stage.run(["apply"]).code == 0
        after = FeatureReader(stage.home, "production")
        items = after.online_items(ITEMS)
        assert items.categorical["price"].tolist() == [None] * len(ITEMS)
        assert np.isnan(items.dense[:, items.dense_names.index("weight")]).all()
        offline = after.historical_items(ITEMS, times)
        prices = ["costs 0.0", "costs 10.5", None, "costs 58.5"]
        assert offline.categorical["price"].tolist() == prices
        assert shelves(world.servers.hashes()) == 40
        assert stage.run(["materialize"]).code == 0
        assert_equal(after.online_items(ITEMS), offline)
        assert shelves(world.servers.hashes()) == 0


def shelves(hashes: dict[bytes, dict[bytes, bytes]]) -> int:
    """Items with a value of the column that goes."""
    return sum(feature_field("items", "shelf") in values for values in hashes.values())


def test_rows_of_the_future_are_rejected_or_not_copied(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events of a clock that is ahead, and rows that can be read a day after their event only."""
    shift = timedelta(seconds=round(time.time()) - START) - timedelta(days=90, hours=1)
    toml = live_data(world.root / "data", tmp_path / "data", shift)
    events = pq.read_table(tmp_path / "data" / "events.parquet").slice(5)

    def waiting() -> int:
        """Users with an event in the last day."""
        day = pa.scalar(datetime.now(UTC) - timedelta(days=1), TIME)
        rows = events.filter(pc.greater(events["event_timestamp"], day))
        return len(rows["user_id"].unique())

    with world.stage("nothing") as stage:
        use(stage, monkeypatch)
        said = stage.run(["ingest", str(toml)]).result
        assert said["rejected"]["events"] == {"event_timestamp is in the future": 5}
        assert stage.run(world.steps["sequences"]).code == 0
        assert stage.run(["apply"]).code == 0
        most = waiting()
        copied = stage.run(["materialize"]).result["views"]["user_sequences"]
        assert 0 < waiting() <= copied["future"] <= most  # time goes on
        users = FeatureReader(stage.home, "production").online_users(USERS)
        assert users.found.tolist() == [True, True, False, True]
        for sequence in users.sequences.values():
            assert sequence.timestamps.max() <= time.time() - 86_400


def live_data(source: Path, folder: Path, shift: timedelta) -> Path:
    """The data set moved in time and taken as live, the first five events once more in 2099."""
    shutil.copytree(source, folder)
    moved = pa.scalar(shift, pa.duration("us"))
    for name in ("events", "impressions"):
        rows = pq.read_table(folder / f"{name}.parquet")
        place = rows.schema.get_field_index("event_timestamp")
        rows = rows.set_column(place, "event_timestamp", pc.add(rows["event_timestamp"], moved))
        if name == "events":
            late = pa.chunked_array([pa.array([datetime(2099, 1, 1, tzinfo=UTC)] * 5, TIME)])
            ahead = rows.slice(0, 5).set_column(place, "event_timestamp", late)
            rows = pa.concat_tables([ahead, rows])
        pq.write_table(rows, folder / f"{name}.parquet")
    text = TOML.replace("replay = true", "replay = false\navailability_delay_s = 86400")
    for day in ("2024-02-15", "2024-03-01"):
        assert day in text
        text = text.replace(day, str((datetime.fromisoformat(day) + shift).date()))
    (folder / "data.toml").write_text(text, encoding="utf-8")
    return folder / "data.toml"
