import os
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_repo.errors import MissingStepError
from feature_repo.home import Home
from serving.directory import HomeDirectory, NameTable
from tests.serving.conftest import ITEMS, ToyItem, toy_catalog

USERS = {"17": 3, "170": 9, "171": 9, "18": 1, "é": 2}


@pytest.fixture
def table() -> NameTable:
    items = dict(ITEMS) | {"L10": ToyItem("red lamp")}
    return NameTable.of(USERS, toy_catalog(items))


@pytest.mark.parametrize(
    ("prefix", "limit", "found"),
    [
        ("", 9, ["170", "171", "17", "é", "18"]),
        ("17", 9, ["170", "171", "17"]),
        ("17", 2, ["170", "171"]),
        ("171", 9, ["171"]),
        ("é", 9, ["é"]),
        ("z", 9, []),
        ("1700", 9, []),
    ],
)
def test_users(table: NameTable, prefix: str, limit: int, found: list[str]) -> None:
    assert table.users(prefix, limit) == found


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("LAMP", ["L1", "L10", "L2"]),
        ("lamp red", ["L1", "L10"]),
        ("l1", ["L1", "L10"]),
        ("green", ["L2"]),
        ("boat anvil", []),
        ("  ", ["A1", "A2", "GONE", "B2", "L1", "L10", "B1", "L2"]),
    ],
)
def test_items(table: NameTable, query: str, found: list[str]) -> None:
    assert [item_id for item_id, _ in table.items(query, 9)] == found
    assert [item_id for item_id, _ in table.items(query, 1)] == found[:1]


def test_titles(table: NameTable) -> None:
    assert table.title("B1") == "sail boat"
    assert table.title("B9") is None


def write_home(home: Home, users: list[str]) -> None:
    home.events.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"user_id": users}), home.events / "part-0.parquet")
    items = {"item_id": ["L1"], "event_timestamp": [1], "text_id": [7]}
    pq.write_table(pa.table(items), home.items)
    pq.write_table(pa.table({"behavior_id": [7], "text": ["red lamp"]}), home.behaviors)
    home.manifest.write_text("{}")


def test_a_home_is_read_when_asked_and_again_after_an_ingest(tmp_path: Path) -> None:
    home = Home(tmp_path)
    directory = HomeDirectory(home)
    with pytest.raises(MissingStepError, match="longtrail ingest"):
        directory.title("L1")
    write_home(home, ["ann", "bob", "bob"])
    assert directory.users("", 5) == ["bob", "ann"]
    assert directory.items("lamp", 5) == [("L1", "red lamp")]
    write_home(home, ["cid"])
    os.utime(home.manifest, ns=(1, 1))
    assert directory.users("", 5) == ["cid"]


def test_a_swap_of_the_tables_is_waited_for(tmp_path: Path) -> None:
    home = Home(tmp_path)
    write_home(home, ["ann"])
    away = home.tables.with_name("away")
    home.tables.replace(away)
    back = threading.Timer(0.2, lambda: away.replace(home.tables))
    back.start()
    directory = HomeDirectory(home)
    assert directory.users("", 5) == ["ann"]
    back.join()
    home.tables.replace(away)
    assert directory.users("", 5) == ["ann"]  # from memory


def test_tables_without_events_are_a_sentence(tmp_path: Path) -> None:
    home = Home(tmp_path)
    write_home(home, ["ann"])
    (home.events / "part-0.parquet").unlink()
    with pytest.raises(MissingStepError, match="run `longtrail ingest` again"):
        HomeDirectory(home).users("", 5)


def test_one_thread_reads_while_the_others_answer_from_the_old_table(tmp_path: Path) -> None:
    home = Home(tmp_path)
    write_home(home, ["ann"])
    directory = HomeDirectory(home)
    assert directory.users("", 5) == ["ann"]
    write_home(home, ["bob"])
    (home.events / "part-0.parquet").rename(home.events / "part-0.away")
    os.utime(home.manifest, ns=(1, 1))
    found: list[list[str]] = []
    reading = threading.Thread(target=lambda: found.append(directory.users("", 5)))
    reading.start()  # waits for the file, up to two seconds
    time.sleep(0.2)
    start = time.monotonic()
    assert directory.users("", 5) == ["ann"]
    assert time.monotonic() - start < 0.2
    (home.events / "part-0.away").rename(home.events / "part-0.parquet")
    reading.join()
    assert found == [["bob"]]
    assert directory.users("", 5) == ["bob"]
