"""Files into a real PostgreSQL: what is loaded equals the files, whatever happened on the way."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres import (
    PostgreSQLOfflineStoreConfig,
)

from feature_repo.connections import DatabaseAddress
from feature_repo.dataset import LoadedDataSet
from feature_repo.errors import StoreError
from feature_repo.home import Home
from feature_repo.ingest import ingest
from feature_repo.postgres_load import LoadedTable, load_tables
from feature_repo.postgres_session import Database
from feature_repo.progress import Progress
from feature_repo.services.postgres import PostgresServer
from feature_repo.services.processes import free_port
from tests.forked import run_forked
from tests.servers import PASSWORD
from tests.waiting import wait_until

TIME = pa.timestamp("us", tz="UTC")
VIEW = "user_stats"


def database_at(url: str, patience_s: float = 10.0) -> Database:
    address = DatabaseAddress.parse(url)
    config = PostgreSQLOfflineStoreConfig(
        host=address.host, port=address.port, database=address.name, user=address.user,
        password=address.password, sslmode=address.sslmode,
    )  # fmt: skip
    return Database(config, patience_s=patience_s)


def after(num_calls: int, act: Any) -> Any:
    """Bars whose progress acts at its n-th news: in the middle of a COPY, before its commit."""
    left = [num_calls]

    def progress(advance: int, total: int, **figures: float) -> None:
        left[0] -= 1
        if left[0] == 0:
            act()

    @contextmanager
    def bars(_table: str) -> Iterator[Progress]:
        yield progress

    return bars


def write_part(home: Home, number: int, *, first: int, num: int = 50, more: str = "") -> None:
    """A file of the view: users from ``first`` on, two rows each, optionally with a column."""
    times = pa.array([1_700_000_000_000_000 + n for n in range(2 * num)], TIME)
    columns = {
        "user_id": [f"user {first + n // 2}" for n in range(2 * num)],
        "event_timestamp": times,
        "created_timestamp": times,
        "purchase_count_7d": pa.array([first + n / 4 for n in range(2 * num)], pa.float32()),
    }
    if more:
        columns[more] = pa.array([[n, 2**60 + n] for n in range(2 * num)], pa.list_(pa.int64()))
    home.view(VIEW).mkdir(parents=True, exist_ok=True)
    path = home.view(VIEW) / f"part-{number:05d}.parquet"
    pq.write_table(pa.table(columns), path)
    # Two writes within the file system's tick are two identities all the same.
    os.utime(path, ns=(time.time_ns(), time.time_ns() + number))


def of_files(home: Home, pattern: str = "*.parquet") -> list[Any]:
    tables = [pq.read_table(path) for path in sorted(home.view(VIEW).glob(pattern))]
    return sorted(tuple(row.values()) for row in pa.concat_tables(tables).to_pylist())


def of_table(url: str) -> list[Any]:
    with psycopg.connect(url) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        rows = connection.execute(f"SELECT * FROM {VIEW}").fetchall()
    return sorted(row[:-1] for row in rows)


def plain(row: Any) -> str:
    """A row as text, whatever spells its time zone."""
    return str([value.timestamp() if isinstance(value, datetime) else value for value in row])


def changes(loaded: list[LoadedTable]) -> list[tuple[str, int, int, int]]:
    return [(t.name, t.num_rows, t.num_parts, t.num_removed) for t in loaded]


def query(url: str, statement: str) -> list[Any]:
    with psycopg.connect(url) as connection:
        return connection.execute(statement).fetchall()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    built = Home(tmp_path / "home")
    for number in range(3):
        write_part(built, number, first=1000 * number)
    return built


def test_only_what_is_new_is_loaded(home: Home, database_url: str) -> None:
    database = database_at(database_url)
    assert changes(load_tables(home, database)) == [(VIEW, 300, 3, 0)]
    assert of_table(database_url) == of_files(home)
    assert load_tables(home, database) == []
    write_part(home, 3, first=3000)
    assert changes(load_tables(home, database)) == [(VIEW, 100, 1, 0)]
    assert of_table(database_url) == of_files(home)
    parts = query(database_url, "SELECT part, num_rows, first_event FROM longtrail_parts")
    assert {part for part, _, _ in parts} == {f"part-{n:05d}.parquet" for n in range(4)}
    assert {(rows, first.timestamp()) for _, rows, first in parts} == {(100, 1_700_000_000.0)}


def test_a_replaced_and_a_removed_file(home: Home, database_url: str) -> None:
    database = database_at(database_url)
    load_tables(home, database)
    # The users of the removed file move into the replaced one: no row may be there twice.
    (home.view(VIEW) / "part-00002.parquet").unlink()
    write_part(home, 1, first=2000)
    assert changes(load_tables(home, database)) == [(VIEW, 100, 1, 2)]
    assert of_table(database_url) == of_files(home)


def test_a_view_built_anew_replaces_its_table_in_one_moment(home: Home, database_url: str) -> None:
    load_tables(home, database_at(database_url))
    for number in range(3):
        write_part(home, number, first=5000 + 1000 * number)
    seen = []

    def look() -> None:
        seen.append(of_table(database_url))

    before = of_table(database_url)
    loaded = load_tables(home, database_at(database_url), bars=after(2, look))
    assert seen == [before]
    assert changes(loaded) == [(VIEW, 300, 3, 3)]
    assert of_table(database_url) == of_files(home)
    indexes = query(database_url, f"SELECT indexname FROM pg_indexes WHERE tablename = '{VIEW}'")
    assert indexes == [(f"{VIEW}_by_user_id",)]


def test_other_columns_make_the_table_anew(
    home: Home, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    load_tables(home, database_at(database_url))
    for number in range(3):
        write_part(home, number, first=number, more="purchase_item_keys")
    load_tables(home, database_at(database_url))
    assert f"the columns of {VIEW} changed" in caplog.text
    assert of_table(database_url) == of_files(home)
    assert load_tables(home, database_at(database_url)) == []


def test_two_rows_of_equal_key_and_times_are_refused(home: Home, database_url: str) -> None:
    """Feast's join would multiply rows: such a view never gets in, and the old one stays."""
    load_tables(home, database_at(database_url))
    before = of_table(database_url)
    write_part(home, 3, first=0)
    with pytest.raises(StoreError, match=f'unique constraint "{VIEW}_by_user_id"'):
        load_tables(home, database_at(database_url))
    assert of_table(database_url) == before


def killed_load(root: Path, database_url: str) -> None:
    """A load that ends itself with SIGKILL at its second news."""
    bars = after(2, lambda: os.kill(os.getpid(), signal.SIGKILL))
    load_tables(Home(root), database_at(database_url), bars=bars)


@pytest.mark.parametrize("replaced", [False, True])
def test_killed_in_the_middle_of_a_copy(
    home: Home, database_url: str, replaced: bool, tmp_path: Path, fork_server: None
) -> None:
    expected = []
    if replaced:
        load_tables(home, database_at(database_url))
        expected = of_table(database_url)
        for number in range(3):
            write_part(home, number, first=7000 + 1000 * number)
    done = run_forked(killed_load, home.root, database_url, output=tmp_path / "said")
    assert done.code == -signal.SIGKILL, done.said
    # What came is whole files; what was replaced is all there as it was.
    if not replaced:
        expected = of_files(home, "part-00000.parquet")
    assert of_table(database_url) == expected
    loaded = load_tables(home, database_at(database_url))
    assert changes(loaded) == [(VIEW, 300, 3, 3) if replaced else (VIEW, 200, 2, 0)]
    assert of_table(database_url) == of_files(home)


def test_the_server_is_killed_in_the_middle_of_a_load(home: Home, scratch: Path) -> None:
    server = PostgresServer(scratch / "postgres", free_port(), PASSWORD, settings=("fsync=off",))
    server.start()
    try:

        def kill() -> None:
            process = server.process()
            assert process is not None
            process.kill()
            process.wait()

        place = f"127.0.0.1:{server.port}/longtrail"
        with pytest.raises(StoreError, match=f"PostgreSQL at {place}: .*; check the server"):
            load_tables(home, database_at(server.url), bars=after(2, kill))
        server.start()
        assert changes(load_tables(home, database_at(server.url))) == [(VIEW, 200, 2, 0)]
        assert of_table(server.url) == of_files(home)
    finally:
        server.stop()


def test_a_file_that_is_replaced_meanwhile_is_named(home: Home, database_url: str) -> None:
    path = home.view(VIEW) / "part-00002.parquet"
    with pytest.raises(StoreError, match=f"{path} went away while it was being loaded"):
        load_tables(home, database_at(database_url), bars=after(2, path.unlink))
    assert of_table(database_url) == of_files(home)


def test_a_second_load_waits_for_the_first(
    home: Home, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    second: list[LoadedTable] = []
    thread = threading.Thread(
        target=lambda: second.extend(load_tables(home, database_at(database_url)))
    )

    def meanwhile() -> None:
        thread.start()
        wait_until(lambda: "waiting" in caplog.text, most_s=20, poll_s=0.01)

    first = load_tables(home, database_at(database_url), bars=after(1, meanwhile))
    thread.join(timeout=20)
    assert changes(first) == [(VIEW, 300, 3, 0)]
    assert second == []
    assert of_table(database_url) == of_files(home)


def test_a_server_that_is_not_there_is_named_without_its_password(home: Home) -> None:
    port = free_port()
    database = database_at(f"postgresql://someone:secret@127.0.0.1:{port}/shop?sslmode=disable")
    with pytest.raises(StoreError) as error:
        load_tables(home, database)
    said = str(error.value)
    assert said.startswith(f"PostgreSQL at 127.0.0.1:{port}/shop: ")
    assert said.endswith("what is missing in PostgreSQL is loaded then")
    assert "secret" not in said
    assert "secret" not in repr(database)


def test_canonical_tables_are_readable(
    tmp_path: Path, kitchen: LoadedDataSet, database_url: str
) -> None:
    home = Home(tmp_path / "home")
    ingest(home, kitchen)
    loaded = {table.name: table.num_rows for table in load_tables(home, database_at(database_url))}
    files = {
        "canonical_events": sorted(home.events.glob("*.parquet")),
        "canonical_items": [home.items],
        "canonical_impressions": [home.impressions],
        "canonical_behaviors": [home.behaviors],
    }
    assert loaded.keys() == files.keys()
    for name, paths in files.items():
        table = pq.read_table(paths)
        assert loaded[name] == table.num_rows
        with psycopg.connect(database_url) as connection:
            connection.execute("SET TimeZone = 'UTC'")
            rows = connection.execute(f"SELECT * FROM {name}").fetchall()
        expected = [list(row.values()) for row in table.to_pylist()]
        assert sorted(map(plain, (row[:-1] for row in rows))) == sorted(map(plain, expected)), name
    comments = query(
        database_url,
        "SELECT attname, col_description(attrelid, attnum) FROM pg_attribute "
        "WHERE attrelid = 'canonical_events'::regclass AND attnum > 0",
    )
    assert all(comment for _, comment in comments)
    assert ("user_id", "Who did it.") in comments
