"""Offline features in PostgreSQL: the production profile.

Feast's own join carries every feature through an inequality join. Here the requests go into a
temporary table, the index on (key, times) finds each one's row, and the rows found are then read,
each once, in the order in which they lie. A test proves both equal, value by value.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
from feast import FeatureStore, FeatureView
from numpy.typing import NDArray
from psycopg import sql

from feature_repo.errors import StoreError
from feature_repo.offline_files import batch_parts, missing_features
from feature_repo.postgres_binary import HEADER, TRAILER, encode
from feature_repo.postgres_session import Database, Session, columns_of, read_table, schema_of

PARTS_TABLE = "longtrail_parts"
"""Which parts of which files are loaded: see :mod:`feature_repo.postgres_load`."""
PART_COLUMN = "longtrail_part"
"""Column of every loaded table: the part that the row came from."""

_FETCH_ROWS = 5000
"""Rows read by one statement."""
_BLOCK_BITS = 16
"""A row's place is (block << 16) + number within the block, as PostgreSQL's ``ctid``."""


class OfflinePostgres:
    """The contract of :class:`feature_repo.offline.OfflineStore` over loaded tables.

    Args:
        store: Feast's store; its views have PostgreSQL sources.
    """

    def __init__(self, store: FeatureStore) -> None:
        self._store = store
        self._database = Database(store.config.offline_store)
        self._sources: dict[str, tuple[str, str]] = {}

    def held(self) -> AbstractContextManager[None]:
        """Within it, one session serves every question."""
        return self._database.held()

    def latest_rows(
        self,
        view: str,
        *,
        keys: pa.Array,
        times: NDArray[np.int64],
        ttl: timedelta | None,
        columns: Sequence[str],
    ) -> tuple[pa.Table, NDArray[np.int64]]:
        """Find the row of each request; O(R log S) for S rows of the view."""
        key, table = self._source(view)
        requests = pa.record_batch(
            {
                "request": pa.array(np.arange(len(times))),
                "key": keys,
                "time": pa.array(times, pa.timestamp("us", tz="UTC")),
            }
        )

        def work(session: Session) -> tuple[pa.Table, NDArray[np.int64]]:
            schema = self._schema(session, view, table, columns)
            with session.transaction():
                session.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")  # places stay
                _upload(session, requests, schema.field(key).type)
                request, located = _locate(session, table, key, ttl)
                distinct, inverse = np.unique(located, return_inverse=True)
                place = np.full(len(times), -1, dtype=np.int64)
                place[request] = inverse.reshape(-1)
                chosen = pa.schema([schema.field(name) for name in columns])
                batches = list(_rows_at(session, table, distinct, chosen))
            rows = pa.Table.from_batches(batches, schema=chosen)
            assert rows.num_rows == len(distinct), "the rows changed within a snapshot"
            return rows, place

        return self._database.read(work)

    def newest_rows(
        self, view: str, *, start: datetime, end: datetime, batch_rows: int
    ) -> tuple[int, Iterator[pa.RecordBatch]]:
        """Find each key's newest row, in the order of the keys.

        A batch is a statement of its own, so no transaction stays open while the caller works, and
        a server that restarts meanwhile is asked again.
        """
        key, table = self._source(view)

        def prepare(session: Session) -> tuple[int, pa.Schema]:
            schema = self._schema(session, view, table)
            counted = session.execute(
                sql.SQL(
                    "SELECT count(*) FROM (SELECT DISTINCT {key} FROM {table} "
                    "WHERE event_timestamp BETWEEN %s AND %s) keys"
                ).format(key=sql.Identifier(key), table=sql.Identifier(table)),
                [start, end],
            ).fetchone()
            assert counted is not None
            return int(counted[0]), schema

        num_keys, schema = self._database.read(prepare)

        def batches() -> Iterator[pa.RecordBatch]:
            last: str | int | None = None
            while True:
                query = _newest_query(table, key, schema, (start, end), last, batch_rows)
                found = self._database.read(
                    lambda session, query=query: list(read_table(session, query, schema))  # type: ignore[misc]
                )
                yield from found
                if sum(batch.num_rows for batch in found) < batch_rows:
                    return
                last = found[-1].column(key)[-1].as_py()

        return num_keys, batches()

    def parts(self, view: str) -> dict[str, list[int]]:
        """Loaded files of the batch -> [size in bytes, change time in ns] when it was loaded."""
        _, table = self._source(view)

        def work(session: Session) -> dict[str, list[int]]:
            if not columns_of(session, PARTS_TABLE):
                return {}
            return batch_parts(loaded_parts(session, table))

        return self._database.read(work)

    def first_event(self, view: str, parts: Collection[str]) -> datetime:
        """Oldest event time in some parts."""
        _, table = self._source(view)
        query = sql.SQL(
            "SELECT part, first_event FROM {} WHERE table_name = %s AND part = ANY(%s)"
        ).format(sql.Identifier(PARTS_TABLE))
        found: dict[str, datetime] = dict(
            self._database.read(
                lambda session: session.execute(query, [table, list(parts)]).fetchall()
            )
        )
        if gone := sorted(set(parts) - found.keys()):
            raise StoreError(
                f"{table} in PostgreSQL holds no part {', '.join(gone)} any more: it is being "
                "loaded anew; run this again when that is done"
            )
        return min(found.values())

    def ask(self, view: str, question: str) -> tuple[Any, ...]:
        """Ask PostgreSQL."""
        key, table = self._source(view)
        query = sql.SQL(question).format(rows=sql.Identifier(table), key=sql.Identifier(key))

        def work(session: Session) -> tuple[Any, ...]:
            if not columns_of(session, table):
                raise missing_features(view, f"{table} in PostgreSQL at {self._database.place}")
            row = session.execute(query).fetchone()
            assert row is not None, "an aggregate has one row"
            return row

        return self._database.read(work)

    def require(self, view: str) -> None:
        """Raise a :class:`MissingStepError` where nothing of the view was loaded."""
        if not self.parts(view):
            _, table = self._source(view)
            raise missing_features(view, f"{table} in PostgreSQL at {self._database.place}")

    def _source(self, view: str) -> tuple[str, str]:
        """The view's join key, and its table; the registry, a server too, is asked but once."""
        if view not in self._sources:
            applied = self._store.get_feature_view(view)
            self._sources[view] = (view_key(applied), view_table(applied))
        return self._sources[view]

    def _schema(
        self, session: Session, view: str, table: str, wanted: Sequence[str] = ()
    ) -> pa.Schema:
        """The columns of a view's files, without the loader's own."""
        columns = columns_of(session, table)
        columns.pop(PART_COLUMN, None)
        if not columns:
            raise missing_features(view, f"{table} in PostgreSQL at {self._database.place}")
        if missing := [name for name in wanted if name not in columns]:
            raise StoreError(
                f"{table} in PostgreSQL has no column {', '.join(missing)}, which {view} was "
                "applied with: run `longtrail apply`, or the step that builds it again"
            )
        return schema_of(columns)


def view_key(view: FeatureView) -> str:
    """The join key of a view; each of ours has one."""
    (column,) = view.entity_columns
    return str(column.name)


def view_table(view: FeatureView) -> str:
    """The table of a view with a PostgreSQL source."""
    return str(view.batch_source._postgres_options._table)


def loaded_parts(session: Session, table: str) -> dict[str, list[int]]:
    """Part -> identity of the file that it was loaded from."""
    rows = session.execute(
        sql.SQL("SELECT part, identity FROM {} WHERE table_name = %s ORDER BY part").format(
            sql.Identifier(PARTS_TABLE)
        ),
        [table],
    ).fetchall()
    return dict(rows)


def _upload(session: Session, requests: pa.RecordBatch, key_type: pa.DataType) -> None:
    """Put the requests into a table of this transaction."""
    kind = "bigint" if key_type == pa.int64() else "text"
    session.execute(
        f"CREATE TEMP TABLE requests (request bigint, key {kind}, time timestamptz) ON COMMIT DROP"
    )
    requests = requests.set_column(1, "key", requests.column(1).cast(key_type))
    with (
        session.cursor() as cursor,
        cursor.copy("COPY requests FROM STDIN (FORMAT binary)") as copy,
    ):
        copy.write(HEADER)
        for block in encode(requests):
            copy.write(block)
        copy.write(TRAILER)


def _locate(
    session: Session, table: str, key: str, ttl: timedelta | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Requests that have a row, and the row's place: both int64 [found]."""
    # The newest row that is not expired is the newest row, or there is none.
    oldest = sql.SQL("AND s.event_timestamp >= r.time - {}").format(ttl) if ttl else sql.SQL("")
    query = sql.SQL(
        """
        SELECT coalesce(array_agg(request), '{{}}'), coalesce(array_agg(place), '{{}}') FROM (
            SELECT r.request,
                split_part(trim(BOTH '()' FROM s.place::text), ',', 1)::bigint * {blocks}
                + split_part(trim(BOTH '()' FROM s.place::text), ',', 2)::bigint AS place
            FROM requests r CROSS JOIN LATERAL (
                SELECT ctid AS place FROM {table} s
                WHERE s.{key} = r.key AND s.event_timestamp <= r.time {oldest}
                ORDER BY s.event_timestamp DESC, s.created_timestamp DESC LIMIT 1
            ) s
        ) found
        """
    ).format(
        blocks=sql.Literal(1 << _BLOCK_BITS),
        table=sql.Identifier(table),
        key=sql.Identifier(key),
        oldest=oldest,
    )
    numbers = pa.list_(pa.int64())  # one row: each costs more than what these numbers do
    schema = pa.schema([("requests", numbers), ("places", numbers)])
    (found,) = read_table(session, query, schema)
    return found["requests"].values.to_numpy(), found["places"].values.to_numpy()


def _rows_at(
    session: Session, table: str, places: NDArray[np.int64], schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """The rows at sorted, distinct places, in that order."""
    for start in range(0, len(places), _FETCH_ROWS):
        chunk = places[start : start + _FETCH_ROWS]
        blocks, numbers = chunk >> _BLOCK_BITS, chunk & ((1 << _BLOCK_BITS) - 1)
        tids = ",".join(f'"({b},{n})"' for b, n in zip(blocks, numbers, strict=True))
        query = sql.SQL(
            "SELECT {columns} FROM {table} WHERE ctid = ANY({places}::tid[]) ORDER BY ctid"
        ).format(columns=_names(schema.names), table=sql.Identifier(table), places=f"{{{tids}}}")
        yield from read_table(session, query, schema)


def _newest_query(
    table: str,
    key: str,
    schema: pa.Schema,
    times: tuple[datetime, datetime],
    last: str | int | None,
    num_keys: int,
) -> sql.Composed:
    """Each key's newest row, of the first keys after ``last``.

    The row is found by a lookup per key, which no plan turns into a scan of the whole table, as it
    did a join.
    """
    after = sql.SQL("AND {} > {}").format(sql.Identifier(key), last) if last is not None else None
    start, end = times
    return sql.SQL(
        """
        SELECT {columns} FROM (
            SELECT DISTINCT {key} AS wanted FROM {table}
            WHERE event_timestamp BETWEEN {start} AND {end} {after}
            ORDER BY wanted LIMIT {num_keys}
        ) keys CROSS JOIN LATERAL (
            SELECT {columns} FROM {table}
            WHERE {key} = wanted AND event_timestamp BETWEEN {start} AND {end}
            ORDER BY event_timestamp DESC, created_timestamp DESC LIMIT 1
        ) newest
        ORDER BY wanted
        """
    ).format(
        columns=_names(schema.names),
        table=sql.Identifier(table),
        key=sql.Identifier(key),
        start=start,
        end=end,
        after=after or sql.SQL(""),
        num_keys=num_keys,
    )


def _names(columns: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(sql.Identifier(name) for name in columns)
