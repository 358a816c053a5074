"""`longtrail materialize` and lookups in the production profile, on real servers."""

import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psycopg
import pytest
from feast import FeatureService

from feature_repo.columns import Ragged
from feature_repo.connections import DATABASE_URL, REDIS_URL
from feature_repo.errors import LongtrailError, StoreError
from feature_repo.feast_bytes import feature_field
from feature_repo.home import Home
from feature_repo.materialize import (
    Materialized,
    apply,
    copied_views,
    feast_in_log,
    materialize,
    prune_online,
)
from feature_repo.parity import check_parity
from feature_repo.postgres_load import load_tables
from feature_repo.postgres_session import Database
from feature_repo.profiles import open_store
from feature_repo.reader import FeatureReader
from feature_repo.redis_lookup import RedisLine, ViewLayout
from feature_repo.services.postgres import DATABASE, PostgresServer
from feature_repo.services.redis import RedisServer
from tests.feature_repo.conftest import write_files
from tests.feature_repo.test_reader import assert_equal, build
from tests.servers import RedisCluster

USERS = np.array([*(str(n) for n in range(30)), "stranger", "0"], dtype=object)
ITEMS = np.array([*(f"P{n}" for n in range(6)), "unknown"], dtype=object)


@pytest.fixture(scope="module")
def loaded(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Home, str]]:
    """The kitchen, built, and the address of a database of its own."""
    folder = tmp_path_factory.mktemp("kitchen")
    write_files(folder)
    home = Home(folder / "home")
    build(home, folder)
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    yield home, postgres.url.replace(f"/{DATABASE}?", f"/{name}?")
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture(scope="module", params=["server", "cluster"])
def home(
    request: pytest.FixtureRequest,
    loaded: tuple[Home, str],
) -> Iterator[Home]:
    """The kitchen with everything in PostgreSQL and in Redis."""
    built, database_url = loaded
    server: RedisServer | RedisCluster = request.getfixturevalue(f"redis_{request.param}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DATABASE_URL, database_url)
        patch.setenv(REDIS_URL, server.url)
        apply(built, "production")
        load_tables(built, Database(open_store(built, "production").config.offline_store))
        materialize(built, "production", full=True, num_workers=2)
        yield built


def test_offline_and_online_give_equal_bytes(home: Home) -> None:
    reader = FeatureReader(home, "production")
    users, items = reader.online_users(USERS), reader.online_items(ITEMS)
    assert_equal(reader.historical_users(USERS, reader.request_times(len(USERS))), users)
    assert_equal(reader.historical_items(ITEMS, reader.request_times(len(ITEMS))), items)
    embedded = FeatureReader(home)
    assert_equal(embedded.online_users(USERS), users)
    assert_equal(embedded.online_items(ITEMS), items)
    assert users.found.tolist() == [True] * 30 + [False, True]


def test_the_direct_lookup_is_feasts_value_by_value(home: Home) -> None:
    reader = FeatureReader(home, "production")
    for views, keys in ((reader._user_views, USERS), (reader._item_views, ITEMS)):
        times = reader.request_times(len(keys))
        direct = reader.views._from_redis(views, keys.tolist(), times)
        feasts = reader.views._from_response(views, keys.tolist(), times)
        assert direct.keys() == feasts.keys()
        for name, columns in feasts.items():
            assert direct[name].present.tolist() == columns.present.tolist()
            for feature, column in columns.values.items():
                other = direct[name].values[feature]
                if isinstance(column, Ragged):
                    assert isinstance(other, Ragged)
                    assert column.lengths.tolist() == other.lengths.tolist()
                    column, other = column.values, other.values
                assert isinstance(other, np.ndarray)
                assert column.dtype == other.dtype
                np.testing.assert_array_equal(column, other)


def test_nothing_new_is_nothing_to_do(home: Home) -> None:
    assert all(view.start is None for view in materialize(home, "production"))
    assert check_parity(home, "production", sample=30).mismatches == 0


@pytest.mark.parametrize("after", ["a removed column", "a kill", "everything", "a collection"])
def test_what_no_view_declares_leaves_redis(home: Home, after: str) -> None:
    store = open_store(home, "production")
    line = RedisLine(store, timeout_s=5)
    layout = ViewLayout.of(store, store.get_feature_view("items"))
    keys = layout.codec.encode(["P0", "P1", "never heard of"])
    field = feature_field("items", "colour")
    for key in keys:
        line.client.hset(key, field, b"\x12\x03red")

    def left() -> list[bytes | None]:
        return [value for (value,) in line.hashes(keys, [field])]

    assert all(view.num_rows == 0 for view in materialize(home, "production"))
    assert left() == [b"\x12\x03red"] * 3  # to look for it takes a walk through all keys
    record = home.materialized("production")
    known = Materialized.load(record, made_by="a test")
    if after in ("a removed column", "a collection"):  # it was copied once
        state = known.views["items"]
        features = {**state.features, "colour": "String"}
        views = {**known.views, "items": state.model_copy(update={"features": features})}
        known.model_copy(update={"views": views}).save(record)
    elif after == "a kill":  # of the run that had copied everything else
        known.model_copy(update={"prune": True}).save(record)
    if after == "a collection":
        prune_online(home, "production")
        assert "colour" not in copied_views(home, "production")["items"].features
    else:
        materialize(home, "production", full=after == "everything")
    assert left() == [None] * 3
    assert not line.client.exists(keys[2])
    assert all(view.num_rows == 0 for view in materialize(home, "production"))
    assert not Materialized.load(record, made_by="a test").prune
    assert check_parity(home, "production", sample=30).mismatches == 0


def test_two_at_once_are_refused(home: Home) -> None:
    with home.lock("online-production"), pytest.raises(LongtrailError, match="another process"):
        materialize(home, "production")


def test_redis_away_is_one_sentence_at_once(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REDIS_URL, "redis://:word@127.0.0.1:1/0")
    reader = FeatureReader(home, "production")
    began = time.perf_counter()
    with pytest.raises(StoreError, match="does not answer") as error:
        reader.online_users(["1"])
    assert time.perf_counter() - began < 0.5
    assert "word" not in str(error.value)
    with pytest.raises(StoreError, match="does not answer"):
        materialize(home, "production")


def test_a_view_that_was_removed_and_applied_again_is_copied_again(home: Home) -> None:
    store = open_store(home, "production")
    apply(home, "production")  # nothing has changed: nothing is to be copied
    assert all(view.num_rows == 0 for view in materialize(home, "production"))
    view = store.get_feature_view("items")
    assert view.materialization_intervals
    services = [one for one in store.list_feature_services() if "items" in _view_names(one)]
    with feast_in_log():
        store.apply([], objects_to_delete=[*services, view], partial=False)
    apply(home, "production")
    copied = {one.name: one.num_rows for one in materialize(home, "production")}
    assert {name for name, num_rows in copied.items() if num_rows} == {"items"}
    assert check_parity(home, "production", sample=30).mismatches == 0


def _view_names(service: FeatureService) -> set[str]:
    return {projection.name for projection in service.feature_view_projections}


def test_what_a_store_threw_away_is_told_by_its_counts(tmp_path: Path) -> None:
    record = Materialized(views={}, evicted={"first start": 2})
    assert record.is_whole({"first start": 2})
    assert not record.is_whole({"first start": 3})
    # A server that was started anew counts from 0.
    assert record.is_whole({"second start": 0})
    assert not record.is_whole({"first start": 2, "second start": 1})
    # A record of a version that did not count: nobody knows, and nothing is copied again for it.
    path = tmp_path / "materialized.json"
    record.save(path)
    old = json.loads(path.read_text(encoding="utf-8"))
    del old["evicted"]
    path.write_text(json.dumps(old), encoding="utf-8")
    assert Materialized.load(path, made_by="a test").is_whole({"first start": 9})
