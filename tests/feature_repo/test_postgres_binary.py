"""The binary COPY format against a real server, which reads and writes it by its own code."""

from datetime import UTC, datetime
from typing import Any

import psycopg
import pyarrow as pa
import pytest
from psycopg import sql

from feature_repo.errors import StoreError
from feature_repo.postgres_binary import HEADER, TRAILER, arrow_type, encode, sql_type
from feature_repo.postgres_session import columns_of, read_table, schema_of

TIME = pa.timestamp("us", tz="UTC")
MOMENT = datetime(2024, 2, 29, 23, 59, 59, 999_999, tzinfo=UTC)
VALUES: dict[str, tuple[pa.DataType, list[Any]]] = {
    "truth": (pa.bool_(), [True, None, False, True]),
    "small": (pa.int8(), [-128, 127, None, 0]),
    "short": (pa.int16(), [-(2**15), 2**15 - 1, None, 0]),
    "plain": (pa.int32(), [-(2**31), 2**31 - 1, None, 0]),
    "id": (pa.int64(), [2**53 + 1, -(2**63), None, 2**63 - 1]),
    "real": (pa.float32(), [0.5, None, -0.0, 3.25]),
    "double": (pa.float64(), [0.1, None, -1e-300, float("inf")]),
    "text": (pa.string(), ["", None, "Ünï\tcödé\n\\N \U0001f600", "x" * 3000]),
    "large": (pa.large_string(), ["a", "", None, "b"]),
    "moment": (TIME, [MOMENT, datetime(1970, 1, 1, tzinfo=UTC), None, datetime.max.replace(
        year=9000, tzinfo=UTC)]),
    "ids": (pa.list_(pa.int64()), [[2**53 + 1, -1], [], None, list(range(700))]),
    "vector": (pa.list_(pa.float32()), [[0.5], None, [], [1.5, -2.25]]),
}  # fmt: skip


def batch() -> pa.RecordBatch:
    return pa.record_batch({name: pa.array(v, type=t) for name, (t, v) in VALUES.items()})


@pytest.fixture
def session(database_url: str) -> Any:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        columns = ", ".join(f"{name} {sql_type(t)}" for name, (t, _) in VALUES.items())
        connection.execute(f"CREATE TABLE things ({columns})")
        yield connection


def copy_in(session: Any, rows: pa.RecordBatch) -> None:
    with session.cursor() as cursor, cursor.copy("COPY things FROM STDIN (FORMAT binary)") as copy:
        copy.write(HEADER)
        for block in encode(rows):
            copy.write(block)
        copy.write(TRAILER)


def test_the_server_reads_every_value(session: Any) -> None:
    copy_in(session, batch())
    stored = session.execute("SELECT * FROM things ORDER BY ctid").fetchall()
    for number, (name, (_, values)) in enumerate(VALUES.items()):
        assert [row[number] for row in stored] == values, name


def test_every_value_comes_back(session: Any) -> None:
    # A slice whose buffers begin elsewhere, more rows than a block, and blocks of other lengths.
    table = pa.Table.from_batches([batch()] * 1500).combine_chunks()
    # The server puts rows where there is room.
    table = table.set_column(4, "id", pa.array(range(len(table)), pa.int64()))
    (rows,) = table.slice(3, 5990).to_batches()
    copy_in(session, rows)
    schema = schema_of(columns_of(session, "things"))
    read = list(read_table(session, sql.SQL("SELECT * FROM things ORDER BY id"), schema))
    assert len(read) > 1
    assert pa.Table.from_batches(read).equals(pa.Table.from_batches([rows]).cast(schema))


def test_no_rows_are_no_batch(session: Any) -> None:
    copy_in(session, batch().slice(0, 0))
    schema = schema_of(columns_of(session, "things"))
    assert list(read_table(session, sql.SQL("SELECT * FROM things"), schema)) == []


def test_a_null_within_a_list_is_refused() -> None:
    rows = pa.record_batch({"ids": pa.array([[1, None]], pa.list_(pa.int64()))})
    with pytest.raises(StoreError, match="a list holds a null"):
        list(encode(rows))


@pytest.mark.parametrize(
    "odd", [pa.array([b"x"]), pa.array([["x"]]), pa.array([1], pa.timestamp("s"))]
)
def test_a_type_that_is_not_stored_is_named(odd: pa.Array) -> None:
    with pytest.raises(StoreError, match=f"type {odd.type} cannot be kept".replace("[", r"\[")):
        sql_type(odd.type)
    with pytest.raises(StoreError, match="cannot be kept in PostgreSQL; expected one of bool"):
        list(encode(pa.record_batch({"odd": odd})))
    with pytest.raises(StoreError, match="type jsonb is not read"):
        arrow_type("jsonb")
