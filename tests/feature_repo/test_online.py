"""One contract for the online stores, on real servers; in Redis every byte is Feast's."""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import redis
from feast import FeatureStore, FeatureView
from feast.utils import _convert_arrow_to_proto
from redis import RedisCluster as ClusterClient

from feature_repo.errors import StoreError
from feature_repo.feast_bytes import VALUE_FIELDS, KeyCodec, column_from_bytes, feature_field
from feature_repo.online import OnlineWriter, open_writer
from feature_repo.online_redis import RedisWriter
from feature_repo.redis_lookup import RedisLine, RedisLookup
from feature_repo.redis_pruning import RedisPruning
from feature_repo.services.processes import free_port
from feature_repo.services.redis import RedisServer
from tests.feature_repo.online_stores import (
    TYPES,
    make_batch,
    make_store,
    make_view,
    random_columns,
    redis_config,
)
from tests.servers import RedisCluster

NOON = datetime(2024, 1, 1, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)


@pytest.fixture(params=["redis", "cluster", "sqlite"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def online(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Configuration of an empty online store."""
    if kind == "sqlite":
        return {"type": "sqlite", "path": str(tmp_path / "online.db")}
    if kind == "redis":
        request.getfixturevalue("redis_url")
        return redis_config(request.getfixturevalue("redis_server").connection_string)
    cluster: RedisCluster = request.getfixturevalue("redis_cluster")
    cluster.flush()
    return redis_config(cluster.connection_string, cluster=True)


@pytest.fixture
def store(online: dict[str, Any], tmp_path: Path) -> FeatureStore:
    """Two views of users, one of behaviours."""
    views = [
        make_view(tmp_path, "mixed"),
        make_view(tmp_path, "counts", features=["count"]),
        make_view(tmp_path, "things", is_string=False),
    ]
    return make_store(tmp_path, online, views)


@pytest.fixture
def writer(store: FeatureStore) -> OnlineWriter:
    return open_writer(store)


def read(store: FeatureStore, view: str, feature: str, keys: list[Any]) -> list[Any]:
    key = "user_id" if isinstance(keys[0], str) else "behavior_id"
    rows = [{key: value} for value in keys]
    found = store.get_online_features(features=[f"{view}:{feature}"], entity_rows=rows)
    return list(found.to_dict()[feature])


def connect(kind: str, online: dict[str, Any]) -> Any:
    """A client of the library's own."""
    client: Any = ClusterClient if kind == "cluster" else redis.Redis
    return client(host="127.0.0.1", port=int(online["connection_string"].split(":")[-1]))


def counts(values: dict[str, int], at: datetime) -> pa.RecordBatch:
    return make_batch(list(values), [at] * len(values), {"count": list(values.values())})


def write_as_feast(store: FeatureStore, view: FeatureView, batch: pa.RecordBatch) -> None:
    keys = {c.name: c.dtype.to_value_type() for c in view.entity_columns}
    rows = _convert_arrow_to_proto(batch, view, keys)
    store._get_provider().online_write_batch(store.config, view, rows, None)


def test_plain_feast_reads_what_is_written(store: FeatureStore, writer: OnlineWriter) -> None:
    columns = random_columns(np.random.default_rng(0), 40)
    for name, keys in (
        ("mixed", [*(f"ü{n}" for n in range(39)), ""]),
        ("things", [*(2**53 + n for n in range(38)), 0, -1]),
    ):
        view = store.get_feature_view(name)
        assert writer.write(view, make_batch(keys, [NOON] * 40, columns)) == 40
        assert writer.count(view) == 40
        for feature in TYPES:
            expected = [None if v != v else v for v in columns[feature]]
            assert read(store, name, feature, keys) == expected


def test_a_row_replaces_what_is_not_newer(store: FeatureStore, writer: OnlineWriter) -> None:
    view = store.get_feature_view("counts")
    assert writer.write(view, counts({"a": 1, "b": 1, "c": 1}, NOON)) == 3
    assert writer.write(view, counts({"a": 2}, NOON)) == 1  # a correction
    assert writer.write(view, counts({"b": 2}, NOON - SECOND)) == 0  # late
    assert writer.write(view, counts({"c": 2}, NOON + SECOND)) == 1
    assert read(store, "counts", "count", ["a", "b", "c"]) == [2, 1, 2]
    # A whole copy replaces everything up to its end.
    early = counts({"a": 3, "b": 3, "c": 3}, NOON - SECOND)
    assert writer.write(view, early, until=NOON) == 2
    assert read(store, "counts", "count", ["a", "b", "c"]) == [3, 3, 2]


def test_times_before_1970_are_ordered(store: FeatureStore, writer: OnlineWriter) -> None:
    view = store.get_feature_view("counts")
    old = datetime(1969, 7, 20, 20, 17, 40, tzinfo=UTC)
    writer.write(view, counts({"a": 1}, old))
    assert writer.write(view, counts({"a": 2}, old - SECOND)) == 0
    assert writer.write(view, counts({"a": 3}, old + SECOND)) == 1
    assert writer.write(view, counts({"a": 4}, NOON)) == 1
    assert writer.write(view, counts({"a": 5}, old)) == 0


def test_keys_are_listed_and_deleted_view_by_view(
    store: FeatureStore, writer: OnlineWriter
) -> None:
    view, other = store.get_feature_view("counts"), store.get_feature_view("mixed")
    writer.write(view, counts({f"u{n}": n for n in range(30)}, NOON))
    writer.write(view, counts({"late": 1}, NOON + SECOND))
    writer.write(
        other, make_batch(["u0", "u1"], [NOON] * 2, random_columns(np.random.default_rng(0), 2))
    )
    listed = [key for keys in writer.keys(view, 7) for key in keys.to_pylist()]
    assert sorted(listed) == sorted([*(f"u{n}" for n in range(30)), "late"])
    gone = pa.array(["u0", "u2", "late", "stranger"])
    writer.delete(view, gone, until=NOON)
    assert read(store, "counts", "count", ["u0", "u1", "u2", "late"]) == [None, 1, None, 1]
    assert writer.count(view) == 29
    assert writer.count(other) == 2
    writer.clear(view)
    assert writer.count(view) == 0
    assert writer.count(other) == 2


def test_rows_of_the_future_are_turned_back(store: FeatureStore, writer: OnlineWriter) -> None:
    view = store.get_feature_view("counts")
    writer.write(view, counts({"early": 1, "now": 1}, NOON))
    writer.write(view, counts({"late": 1}, NOON + SECOND))
    assert writer.turn_back(view, to=NOON - SECOND, now=lambda: NOON) == 1
    keys = ["early", "now", "late"]
    assert read(store, "counts", "count", keys) == [1, 1, 1]
    writer.write(view, counts(dict.fromkeys(keys, 2), NOON - SECOND))
    assert read(store, "counts", "count", keys) == [1, 1, 2]


@pytest.mark.parametrize("kind", ["redis", "cluster"], indirect=False)
def test_what_is_pushed_while_rows_are_turned_back_stays(
    kind: str, store: FeatureStore, writer: OnlineWriter
) -> None:
    view = store.get_feature_view("counts")
    writer.write(view, counts({"a": 1}, NOON + SECOND))

    def now() -> datetime:
        writer.write(view, counts({"a": 2}, NOON + 2 * SECOND))
        return NOON

    assert writer.turn_back(view, to=NOON, now=now) == 0
    writer.write(view, counts({"a": 3}, NOON), until=NOON)
    assert read(store, "counts", "count", ["a"]) == [2]


def test_values_of_removed_features_are_deleted(
    store: FeatureStore, writer: OnlineWriter, online: dict[str, Any], tmp_path: Path
) -> None:
    columns = random_columns(np.random.default_rng(0), 4)
    for name, keys in (("mixed", ["u0", "u1", "u2", "u3"]), ("things", [1, 2, 3, 4])):
        writer.write(store.get_feature_view(name), make_batch(keys, [NOON] * 4, columns))
    writer.write(store.get_feature_view("counts"), counts({"u0": 7}, NOON))
    assert writer.prune() == 0
    narrow = [name for name in TYPES if name not in ("price", "brand")]
    store.apply([make_view(tmp_path, "mixed", features=narrow)])
    assert writer.prune() == 2 * 4
    assert writer.prune() == 0
    assert read(store, "mixed", "count", ["u1"]) == [columns["count"][1]]
    assert read(store, "counts", "count", ["u0"]) == [7]
    assert read(store, "things", "price", [2]) == [columns["price"][1]]
    again = make_store(tmp_path, online, [make_view(tmp_path, "mixed")])
    assert read(again, "mixed", "brand", ["u0", "u1", "u2", "u3"]) == [None] * 4


@pytest.mark.parametrize("kind", ["redis", "cluster"], indirect=False)
def test_only_what_no_view_declares_is_deleted(
    kind: str, store: FeatureStore, writer: OnlineWriter, online: dict[str, Any]
) -> None:
    """What a view that is gone left, but not what others put into the same Redis."""
    writer.write(store.get_feature_view("counts"), counts({"u0": 7}, NOON))
    client = connect(kind, online)
    (key,) = (name for name in client.scan_iter() if not name.startswith(b"longtrail:"))
    kept = client.hgetall(key)
    rests = {feature_field("gone", "count"): b"x", b"_ts:gone": b"y"}
    ours = KeyCodec("user_id", "longtrail", is_string=True)
    others = KeyCodec("user_id", "my-longtrail", is_string=True)
    (whole,), (foreign,) = ours.encode(["only rests"]), others.encode(["u0"])
    pair = b"\2" + whole[1:]  # an entity of two join keys
    for name in (key, whole, foreign, pair, b"a hash of longtrail"):
        client.hset(name, mapping=rests)
    client.hset(key, "a name that Feast does not give", "z")
    client.set(b"a text of longtrail", "z")
    assert writer.prune() == 4
    assert client.hgetall(key) == {**kept, b"a name that Feast does not give": b"z"}
    assert not client.exists(whole)
    for name in (foreign, pair, b"a hash of longtrail"):
        assert client.hgetall(name) == rests
    client.close()


@pytest.mark.parametrize("kind", ["redis"], indirect=False)
def test_a_view_that_is_applied_during_the_walk_loses_nothing(
    kind: str, store: FeatureStore, writer: OnlineWriter, tmp_path: Path
) -> None:
    """More keys than a round trip reads; the registry is asked again where a field is unknown."""
    view = store.get_feature_view("counts")
    users = {f"u{n}": n for n in range(4100)}
    writer.write(view, counts(users, NOON))
    assert isinstance(writer, RedisWriter)
    pruning = RedisPruning(store, writer._line)
    batches = pruning._batches()
    assert pruning._prune(next(batches)) == 0
    store.apply([make_view(tmp_path, "new", features=["count"])])
    writer.write(store.get_feature_view("new"), counts(users, NOON))
    assert sum(map(pruning._prune, batches)) == 0
    assert writer.count(store.get_feature_view("new")) == len(users)


def test_marks_are_lost_with_the_rows(
    kind: str, store: FeatureStore, writer: OnlineWriter, request: pytest.FixtureRequest
) -> None:
    assert writer.marks("counts") == {""}
    writer.mark("counts", "run:1")
    writer.mark("mixed", "other:1")
    assert writer.marks("counts") == {"run:1"}
    if kind == "cluster":  # one node of three
        node = request.getfixturevalue("redis_cluster").nodes[1]
        with redis.Redis(port=node.port) as client:
            client.flushall()
        assert writer.marks("counts") == {"run:1", ""}


@pytest.mark.parametrize("kind", ["redis", "cluster"], indirect=False)
def test_every_byte_in_redis_is_feasts(
    kind: str, store: FeatureStore, writer: OnlineWriter, online: dict[str, Any]
) -> None:
    client = connect(kind, online)

    def stored() -> dict[bytes, dict[bytes, bytes]]:
        return {
            key: client.hgetall(key)
            for key in client.scan_iter()
            if not key.startswith(b"longtrail:")
        }

    columns = random_columns(np.random.default_rng(0), 60)
    times = [NOON + timedelta(microseconds=n * 7919) for n in range(60)]
    for name, keys in (
        ("mixed", [*(f"ü{n}" for n in range(58)), "", "x" * 300]),
        ("things", [*(2**53 + n for n in range(57)), 0, -1, -(2**63)]),
    ):
        view = store.get_feature_view(name)
        batch = make_batch(keys, times, columns)
        write_as_feast(store, view, batch)
        theirs = stored()
        writer.clear(view)
        assert stored() == {}
        writer.write(view, batch)
        assert stored() == theirs
        assert len(theirs) == 60
        writer.clear(view)
    client.close()


@pytest.mark.parametrize("kind", ["redis", "cluster"], indirect=False)
def test_a_lookup_is_what_feast_reads(kind: str, store: FeatureStore, writer: OnlineWriter) -> None:
    columns = random_columns(np.random.default_rng(3), 20)
    keys = [f"u{n}" for n in range(20)]
    mixed, only_counts = store.get_feature_view("mixed"), store.get_feature_view("counts")
    writer.write(mixed, make_batch(keys, [NOON] * 20, columns))
    writer.write(only_counts, counts({"u3": 33}, NOON + SECOND))
    lookup = RedisLookup(store, [(mixed, list(TYPES)), (only_counts, ["count"])])
    asked = ["stranger", *keys]
    (times, messages), (other_times, (other,)) = lookup.read(asked)
    assert times.tolist() == [0] + [int(NOON.timestamp() * 1e6)] * 20
    assert np.flatnonzero(other_times).tolist() == [4]
    assert column_from_bytes(other, other_times != 0, "int64_val")[4] == 33  # type: ignore[index]
    response = store.get_online_features(
        features=[f"mixed:{name}" for name in TYPES],
        entity_rows=[{"user_id": key} for key in asked],
    ).proto
    names = list(response.metadata.feature_names.val)
    for name, found in zip(TYPES, messages, strict=True):
        values = response.results[names.index(name)].values
        assert [message or b"" for message in found] == [v.SerializeToString() for v in values]
        assert VALUE_FIELDS[TYPES[name]] in {v.WhichOneof("val") for v in values}


@pytest.mark.parametrize("kind", ["redis", "cluster"], indirect=False)
def test_a_store_is_copied_to_by_one(kind: str, store: FeatureStore, writer: OnlineWriter) -> None:
    other = open_writer(store)
    with writer.hold("one:/home"), pytest.raises(StoreError, match="one:/home is copying"):
        other.hold("two:/home").__enter__()
    left = writer.hold("one:/home")
    left.__enter__()  # its owner was killed
    with pytest.raises(StoreError, match="wait for it to end"):
        other.hold("two:/home").__enter__()
    with other.hold("one:/home"):
        pass
    with other.hold("two:/home"):
        pass


@pytest.mark.parametrize("kind", ["redis"], indirect=False)
def test_a_restarted_server_gets_the_script_again(
    kind: str, store: FeatureStore, writer: OnlineWriter, redis_server: RedisServer
) -> None:
    with redis.Redis(port=redis_server.port) as client:
        client.script_flush()
    assert writer.write(store.get_feature_view("counts"), counts({"a": 1}, NOON)) == 1


@pytest.mark.parametrize("kind", ["redis"], indirect=False)
def test_a_full_server_is_said(
    kind: str, store: FeatureStore, writer: OnlineWriter, redis_server: RedisServer
) -> None:
    with redis.Redis(port=redis_server.port) as client:
        client.config_set("maxmemory", "1")
        try:
            with pytest.raises(StoreError, match=r"is full \(maxmemory\)"):
                writer.write(store.get_feature_view("counts"), counts({"a": 1}, NOON))
        finally:
            client.config_set("maxmemory", "0")


def sentence(ask: Callable[[], object]) -> str:
    """What is said of a store that fails; "" where it does not."""
    try:
        ask()
    except StoreError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["sqlite"], indirect=False)
def test_a_file_that_another_holds_is_said_by_every_method(
    kind: str, store: FeatureStore, writer: OnlineWriter, tmp_path: Path
) -> None:
    view = store.get_feature_view("counts")
    rows = counts({"a": 1}, NOON)
    writer.write(view, rows)
    writer.mark("counts", "one")
    asked: dict[str, Callable[[], object]] = {
        "write": lambda: writer.write(view, rows),
        "keys": lambda: list(writer.keys(view, 10)),
        "delete": lambda: writer.delete(view, rows.column("user_id"), until=NOON),
        "turn_back": lambda: writer.turn_back(view, to=NOON, now=lambda: NOON - SECOND),
        "clear": lambda: writer.clear(view),
        "prune": lambda: writer.prune(),
        "count": lambda: writer.count(view),
        "mark": lambda: writer.mark("counts", "two"),
        "marks": lambda: writer.marks("counts"),
    }
    own = store._get_provider().online_store._get_conn(store.config)
    own.execute("PRAGMA busy_timeout = 20")
    with closing(sqlite3.connect(tmp_path / "online.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        said = {name: sentence(ask) for name, ask in asked.items()}
        other.execute("ROLLBACK")
    locked = "the online store in SQLite does not answer as it should (database is locked)"
    assert {name: text.partition(";")[0] for name, text in said.items()} == dict.fromkeys(
        asked, locked
    )
    assert writer.marks("counts") == {"one"}
    assert read(store, "counts", "count", ["a"]) == [1]


def test_only_redis_tells_of_evictions(
    kind: str, store: FeatureStore, writer: OnlineWriter
) -> None:
    servers = {"redis": 1, "cluster": 3, "sqlite": 0}
    evicted = writer.evicted()
    assert len(evicted) == servers[kind]
    assert not any(evicted.values())


@pytest.fixture
def own_server(scratch: Path) -> Iterator[RedisServer]:
    """A server of the test's own, to be killed."""
    server = RedisServer(scratch / "redis", free_port(), "secret")
    server.start()
    yield server
    server.stop()


def test_an_address_names_the_time_a_lookup_waits(own_server: RedisServer, tmp_path: Path) -> None:
    view = make_view(tmp_path, "counts", features=["count"])
    patient = f"{own_server.connection_string},socket_timeout=0.9,socket_connect_timeout=0.1"
    store = make_store(tmp_path, redis_config(patient), [view])
    view = store.get_feature_view("counts")
    lookup = RedisLookup(store, [(view, ["count"])])
    lookup.read(["a"])
    process = own_server.process()
    assert process is not None
    process.suspend()
    began = time.perf_counter()
    with pytest.raises(StoreError, match="does not answer"):
        lookup.read(["a"])
    seconds = time.perf_counter() - began
    process.resume()
    assert 0.9 <= seconds < 5
    # A batch waits longer than a lookup, whatever the address says of these.
    for line, expected in ((RedisLine(store), (0.9, 0.1)), (RedisLine(store, timeout_s=5), (5, 5))):
        given = line.client.get_connection_kwargs()
        assert (given["socket_timeout"], given["socket_connect_timeout"]) == expected


def test_a_server_that_is_away_is_said_at_once(own_server: RedisServer, tmp_path: Path) -> None:
    view = make_view(tmp_path, "counts", features=["count"])
    store = make_store(tmp_path, redis_config(own_server.connection_string), [view])
    view = store.get_feature_view("counts")
    writer = open_writer(store)
    writer.write(view, counts({"a": 1}, NOON))
    lookup = RedisLookup(store, [(view, ["count"])])
    lookup.read(["a"])
    process = own_server.process()
    assert process is not None
    process.suspend()  # it hangs
    began = time.perf_counter()
    with pytest.raises(StoreError, match=f"127.0.0.1:{own_server.port} does not answer") as error:
        lookup.read(["a"])
    assert time.perf_counter() - began < 0.5
    assert "secret" not in str(error.value)
    process.resume()
    assert lookup.read(["a"])[0][0].tolist() == [int(NOON.timestamp() * 1e6)]
    process.kill()  # it is gone
    process.wait()
    for ask in (lambda: lookup.read(["a"]), lambda: writer.write(view, counts({"a": 2}, NOON))):
        began = time.perf_counter()
        with pytest.raises(StoreError, match="check that it runs"):
            ask()
        assert time.perf_counter() - began < 0.5
    own_server.start()
    lookup.read(["a"])
    assert writer.write(view, counts({"a": 3}, NOON)) == 1
