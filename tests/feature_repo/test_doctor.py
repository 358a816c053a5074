"""Every trap is set on purpose, on live stores of both profiles, and the doctor finds it."""

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis
from click.testing import CliRunner
from feast import FeatureView, Field, FileSource
from feast.data_format import ParquetFormat
from feast.feature_view import FeatureViewState
from feast.types import Int64, String

from feature_repo.doctor import CHECKS, diagnose
from feature_repo.home import Home
from feature_repo.live_store import LiveStore
from feature_repo.materialize import apply, materialize
from feature_repo.profiles import open_store
from longtrail import main
from tests.feature_repo.online_stores import ENTITIES, make_store, make_view, redis_config
from tests.servers import RedisCluster

NAMES = {check.name for check in CHECKS}


@pytest.fixture
def live(home: Home, profile: str) -> LiveStore:
    return LiveStore.open(home, profile)


def problems(live: LiveStore, name: str) -> str:
    """What one check finds, "" where nothing."""
    (check,) = [check for check in CHECKS if check.name == name]
    return "; ".join(check.problems(live))


@contextmanager
def changed_rows(
    live: LiveStore, view: str, change: Callable[[pa.Table], pa.Table]
) -> Iterator[None]:
    """Other rows of a view in its offline store, and the true ones again at the end."""
    folder = live.home.view(view.replace("_abc", "/abc"))
    paths = sorted(folder.glob("*.parquet"))
    changed = change(pa.concat_tables([pq.read_table(path) for path in paths]))
    if live.store.config.offline_store.type == "postgres":
        with changed_table(live, view, changed):
            yield
        return
    aside = live.home.root / "aside"
    shutil.copytree(folder, aside)
    for path in paths:
        path.unlink()
    pq.write_table(changed, paths[0])
    try:
        yield
    finally:
        shutil.rmtree(folder)
        aside.rename(folder)


@contextmanager
def changed_table(live: LiveStore, view: str, changed: pa.Table) -> Iterator[None]:
    """The table beside, without the index and the columns' rules that a load makes."""
    config = live.store.config.offline_store
    names = ", ".join(f'"{name}"' for name in changed.column_names)
    places = ", ".join(["%s"] * changed.num_columns)
    with psycopg.connect(
        host=config.host, port=config.port, dbname=config.database, user=config.user,
        password=config.password, autocommit=True, options="-c timezone=UTC",
    ) as connection:  # fmt: skip
        connection.execute(f"ALTER TABLE {view} RENAME TO {view}_true")
        connection.execute(
            f"CREATE TABLE {view} AS SELECT {names}, longtrail_part FROM {view}_true WITH NO DATA"
        )
        for field in changed.schema:
            if pa.types.is_timestamp(field.type) and field.type.tz is None:
                connection.execute(f"ALTER TABLE {view} ALTER {field.name} TYPE timestamp")
        rows = [tuple(row.values()) for row in changed.to_pylist()]
        insert = f"INSERT INTO {view} ({names}) VALUES ({places})"
        connection.cursor().executemany(insert, rows)
        try:
            yield
        finally:
            connection.execute(f"DROP TABLE {view}")
            connection.execute(f"ALTER TABLE {view}_true RENAME TO {view}")


def with_first(table: pa.Table, name: str, value: Any) -> pa.Table:
    """The table with another value in the first row of a column."""
    place = table.schema.get_field_index(name)
    kind = table.schema.field(place).type
    column = pa.array([value, *table[name].to_pylist()[1:]], kind)
    return table.set_column(place, pa.field(name, kind), column)


def test_a_healthy_store_is_healthy(home: Home, profile: str) -> None:
    arguments = ["--home", str(home.root), "--profile", profile, "doctor"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["ok"]
    assert {check["name"] for check in told["checks"]} == NAMES
    assert all(check["ok"] and check["fix"] is None for check in told["checks"])


def test_a_problem_is_a_sentence_with_what_to_do_and_exit_code_1(
    home: Home, profile: str, live: LiveStore
) -> None:
    live.store.registry.delete_feature_view("user_stats", live.store.project)
    done = CliRunner().invoke(main, ["--home", str(home.root), "--profile", profile, "doctor"])
    assert done.exit_code == 1
    wrong = {check["name"]: check for check in json.loads(done.stdout)["checks"] if not check["ok"]}
    assert "apply would create the feature view user_stats" in wrong["registry"]["detail"]
    assert wrong["registry"]["fix"] == "run `longtrail apply`"
    assert "WRONG registry: apply would create" in done.stderr
    assert "-> run `longtrail apply`" in done.stderr
    apply(home, profile)
    assert all(finding.ok for finding in diagnose(LiveStore.open(home, profile)))


def test_settings(live: LiveStore) -> None:
    config = live.store.config
    config.registry.registry_type = "file"
    config.registry.serve_features_while_materializing = False
    config.materialization_config.pull_latest_features = False
    config.materialization_config.online_write_batch_size = None
    config.entity_key_serialization_version = 2
    found = problems(live, "settings").split("; ")
    assert [problem.split(" is ")[0] for problem in found] == [
        "registry.registry_type",
        "registry.serve_features_while_materializing",
        "materialization.pull_latest_features",
        "materialization.online_write_batch_size",
        "entity_key_serialization_version",
    ]


def test_a_view_that_a_killed_materialize_left(home: Home, profile: str, live: LiveStore) -> None:
    view = live.store.get_feature_view("user_stats")
    view.state = FeatureViewState.MATERIALIZING
    # A view that differs in its state alone is unchanged to the registry.
    view.materialization_intervals = [*view.materialization_intervals, (live.now, live.now)]
    live.store.registry.apply_feature_view(view, live.store.project)
    assert problems(live, "materializing") == "user_stats is in the state MATERIALIZING"
    materialize(home, profile)  # what the doctor advises
    assert not problems(LiveStore.open(home, profile), "materializing")


def test_a_connection_in_clear_text(live: LiveStore) -> None:
    if live.profile == "embedded":
        assert not problems(live, "encryption")
        return
    config = live.store.config
    config.offline_store.host = "db.example.org"
    config.online_store.connection_string = "127.0.0.1:6379,cache.example.org:6379,password=x"
    assert problems(live, "encryption") == (
        "PostgreSQL at db.example.org is reached with sslmode=disable; "
        "Redis at cache.example.org is reached without TLS"
    )
    config.offline_store.sslmode = "verify-full"
    config.online_store.connection_string += ",ssl=true"
    assert not problems(live, "encryption")
    config.offline_store.sslmode = "prefer"
    config.offline_store.host = "::1"
    assert not problems(live, "encryption")


def test_a_redis_that_evicts_or_is_full(
    profile: str, live: LiveStore, request: pytest.FixtureRequest
) -> None:
    if profile == "embedded":
        assert not problems(live, "redis_memory")
        return
    with redis.Redis(port=request.getfixturevalue("redis_server").port) as client:
        try:
            client.config_set("maxmemory-policy", "allkeys-lru")
            assert not problems(live, "redis_memory")  # there is no limit
            client.config_set("maxmemory", "1gb")
            assert "evicts keys (allkeys-lru) at 1,073,741,824" in problems(live, "redis_memory")
            client.config_set("maxmemory-policy", "noeviction")
            assert not problems(live, "redis_memory")
            used = client.info("memory")["used_memory"]
            client.config_set("maxmemory", int(used * 1.05))
            assert "bytes" in problems(live, "redis_memory")
        finally:
            client.config_set("maxmemory", 0)
            client.config_set("maxmemory-policy", "noeviction")


def test_a_node_of_a_cluster_that_evicts(redis_cluster: RedisCluster, tmp_path: Path) -> None:
    online = redis_config(redis_cluster.connection_string, cluster=True)
    store = make_store(tmp_path, online, [make_view(tmp_path, "counts")])
    live = LiveStore(Home(tmp_path), "production", store)
    assert not problems(live, "redis_memory")
    node = redis_cluster.nodes[1]
    with redis.Redis(port=node.port) as client:
        try:
            client.config_set("maxmemory", "1gb")
            client.config_set("maxmemory-policy", "volatile-ttl")
            assert problems(live, "redis_memory") == (
                f"Redis at 127.0.0.1:{node.port} evicts keys (volatile-ttl) at 1,073,741,824 bytes"
            )
        finally:
            client.config_set("maxmemory", 0)
            client.config_set("maxmemory-policy", "noeviction")


def test_a_full_disk(live: LiveStore) -> None:
    assert not problems(live, "disk")
    live.min_free_bytes = 1 << 60
    assert f"expected {1 << 60:,}" in problems(live, "disk")


def test_vectors_of_another_encoder(home: Home, live: LiveStore) -> None:
    view = "behavior_embeddings_abc"
    with changed_rows(live, view, lambda rows: with_first(rows, "encoder_fingerprint", "xyz")):
        assert problems(live, "versions") == f"{view}, applied as abc, holds vectors of xyz"
    assert not problems(live, "versions")
    before = home.encoder.read_text(encoding="utf-8")
    home.encoder.write_text(before.replace('"abc"', '"new"'), encoding="utf-8")
    try:
        assert "the current encoder needs vectors of new" in problems(live, "versions")
    finally:
        home.encoder.write_text(before, encoding="utf-8")
    table = home.embeddings / "abc" / home.encoder.name
    table.write_text(before.replace('"abc"', '"old"'), encoding="utf-8")
    try:
        assert "is of the encoder old" in problems(live, "versions")
    finally:
        table.unlink()


def test_rows_that_are_not_loaded(home: Home, profile: str, live: LiveStore) -> None:
    path = next(home.view("user_stats").glob("*.parquet"))
    more = path.with_name("part-09999.parquet")
    shutil.copy(path, more)
    try:
        expected = "user_stats holds another state" if profile == "production" else ""
        assert problems(live, "loaded").startswith(expected)
        assert bool(problems(live, "loaded")) == (profile == "production")
    finally:
        more.unlink()


def test_rows_of_equal_key_and_times(live: LiveStore) -> None:
    with changed_rows(live, "user_stats", lambda rows: pa.concat_tables([rows, rows[:3]])):
        found = problems(live, "equal_rows")
    assert found == "user_stats repeats 3 (key, event time, created time)"


def test_times_in_the_future_and_without_zone(live: LiveStore) -> None:
    # Rows of clicks wait an hour until they can be read.
    late = live.now + timedelta(hours=1, seconds=1)
    with changed_rows(live, "user_stats", lambda rows: with_first(rows, "event_timestamp", late)):
        assert "user_stats has 1 rows of after now" in problems(live, "times")
    created = datetime.now(UTC) + timedelta(hours=1)
    with changed_rows(
        live, "user_stats", lambda rows: with_first(rows, "created_timestamp", created)
    ):
        assert "user_stats has 1 rows created in the future" in problems(live, "times")

    def naive(rows: pa.Table) -> pa.Table:
        column = rows["created_timestamp"].cast(pa.timestamp("us"))
        return rows.set_column(
            rows.schema.get_field_index("created_timestamp"), "created_timestamp", column
        )

    with changed_rows(live, "user_stats", naive):
        assert problems(live, "times") == "created_timestamp of user_stats has no time zone"


def test_nulls_where_none_may_be(live: LiveStore) -> None:
    def broken(rows: pa.Table) -> pa.Table:
        return with_first(with_first(rows, "buy_item_keys", [1, None]), "look_total", None)

    with changed_rows(live, "user_sequences", broken):
        found = problems(live, "nulls").split("; ")
    assert found == [
        "user_sequences has 1 lists with a null in buy_item_keys",
        "user_sequences has 1 null in look_total",
    ]


def test_a_column_that_is_gone(live: LiveStore) -> None:
    with changed_rows(live, "user_sequences", lambda rows: rows.drop_columns(["buy_item_keys"])):
        findings = {finding.name: finding for finding in diagnose(live)}
    assert not findings["nulls"].ok
    assert "buy_item_keys" in findings["nulls"].detail
    assert findings["equal_rows"].ok


def test_rows_that_are_not_online_any_more(home: Home, profile: str, live: LiveStore) -> None:
    views = {view.name: view for view in live.views}
    live.writer.delete(views["user_stats"], pa.array(["5", "7"]), until=live.now)
    assert problems(live, "counts") == "user_stats has 28 keys online and 30 offline"
    live.writer.mark("items", "of another store")
    assert problems(live, "copied") == (
        "the online store has lost rows of items, or is another one"
    )
    materialize(home, profile, full=True)
    again = LiveStore.open(home, profile)
    assert not problems(again, "counts") + problems(again, "copied")
    home.materialized(profile).unlink()
    assert "user_stats was never copied" in problems(LiveStore.open(home, profile), "copied")
    materialize(home, profile)


def test_rows_online_whose_time_is_over(live: LiveStore) -> None:
    (view,) = [view for view in live.views if view.name == "user_stats"]
    assert not problems(live, "expired_online")
    view.ttl = timedelta(microseconds=1)
    assert problems(live, "expired_online").startswith("29 of 30 rows of user_stats online")


# What our own definitions cannot be: a store of other views.
def odd_store(folder: Path, view: FeatureView) -> LiveStore:
    online = {"type": "sqlite", "path": str(folder / "online.db")}
    return LiveStore(Home(folder), "embedded", make_store(folder, online, [view]))


def test_a_view_with_two_keys_and_a_source_without_created_column(tmp_path: Path) -> None:
    view = FeatureView(
        name="pairs",
        entities=list(ENTITIES),
        schema=[
            Field(name="user_id", dtype=String),
            Field(name="behavior_id", dtype=Int64),
            Field(name="count", dtype=Int64),
        ],
        source=FileSource(
            name="pairs_source",
            path=str(tmp_path / "*.parquet"),
            file_format=ParquetFormat(),
            timestamp_field="event_timestamp",
        ),
    )
    live = odd_store(tmp_path, view)
    assert "pairs has 2 join keys" in problems(live, "join_keys")
    assert problems(live, "created_column") == (
        "the source of pairs names no created_timestamp_column"
    )


def test_a_view_without_rows(tmp_path: Path) -> None:
    live = odd_store(tmp_path, make_view(tmp_path, "empty"))
    assert problems(live, "built") == "empty has no rows offline"
    assert not problems(live, "join_keys") + problems(live, "created_column")


def test_a_registry_that_fails_is_a_problem_of_the_checks_that_ask_it(home: Home) -> None:
    live = LiveStore.open(home, "embedded")
    registry: Any = live.store.registry
    with registry.read_engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA busy_timeout = 20")
    with closing(sqlite3.connect(home.registry, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        findings = {finding.name: finding for finding in diagnose(live)}
    said = "SQLite does not answer as it should (database is locked)"
    assert findings["materializing"].detail.startswith(said)
    assert not findings["materializing"].ok
    assert findings["settings"].ok


@pytest.mark.parametrize("profile", ["production"])
def test_stores_that_are_away(home: Home, profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://:word@127.0.0.1:1/0")
    findings = {f.name: f for f in diagnose(LiveStore(home, profile, open_store(home, profile)))}
    assert not findings["counts"].ok
    assert "does not answer" in findings["redis_memory"].detail
    assert findings["equal_rows"].ok
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:word@127.0.0.1:1/shop?sslmode=disable")
    done = CliRunner().invoke(main, ["--home", str(home.root), "--profile", profile, "doctor"])
    assert done.exit_code == 1
    assert "registry of the profile 'production' at 127.0.0.1:1 cannot be reached" in done.stderr
    assert "word" not in done.output
