"""Offline features in parquet files: the embedded profile.

Feast's own join is an inequality join that carries every feature: 100,000 requests against 399,998
snapshots of sequences took it 17.6 s and 10.6 GiB (``benchmarks.bench_historical``). Here only keys
and times are joined (ASOF, n log n), then just the rows that were found are read. A test proves
both equal, value by value.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from feast import FeatureStore
from numpy.typing import NDArray

from feature_repo.errors import MissingStepError, StoreError
from feature_repo.query_engine import query_engine
from feature_repo.version_names import unversioned

STEPS = {
    "behavior_embeddings": "encode",
    "user_embeddings": "export",
    "item_embeddings": "export",
}
"""View without version -> command that builds it; `longtrail sequences` builds the others."""
LIVE_PART = "live.parquet"
"""File of the rows of live events (:mod:`feature_repo.live_offline`); the others are a batch's."""
LIVE_PARTS = "live*.parquet"
"""That file, and those of the vectors of live texts (:mod:`encoders.live_files`)."""


class OfflineFiles:
    """The contract of :class:`feature_repo.offline.OfflineStore` over a view's parquet files.

    Args:
        store: Feast's store; its views have file sources.
    """

    def __init__(self, store: FeatureStore) -> None:
        self._store = store

    def held(self) -> AbstractContextManager[None]:
        """Files need no connection."""
        return nullcontext()

    def latest_rows(
        self,
        view: str,
        *,
        keys: pa.Array,
        times: NDArray[np.int64],
        ttl: timedelta | None,
        columns: Sequence[str],
    ) -> tuple[pa.Table, NDArray[np.int64]]:
        """Find the row of each request; O((S + R) log S) for S rows of the view."""
        key, pattern = self._source(view)
        requests = pa.table(
            {
                "request": pa.array(np.arange(len(times))),
                "key": keys,
                "time": pa.array(times, pa.timestamp("us", tz="UTC")),
            }
        )
        oldest = ""
        if ttl:
            lifetime_us = ttl // timedelta(microseconds=1)
            oldest = f"AND r.time <= s.event_timestamp + to_microseconds({lifetime_us})"
        with query_engine() as connection:
            connection.register("requests", requests)
            found = connection.sql(
                f"""
                WITH snapshots AS (
                    SELECT {key} AS key, event_timestamp, filename, file_row_number
                    FROM read_parquet(?, filename = true, file_row_number = true)
                    WHERE {key} IN (SELECT key FROM requests)
                    QUALIFY row_number() OVER (
                        PARTITION BY {key}, event_timestamp ORDER BY created_timestamp DESC
                    ) = 1
                )
                SELECT r.request, s.filename, s.file_row_number
                FROM requests r ASOF JOIN snapshots s
                ON r.key = s.key AND r.time >= s.event_timestamp
                WHERE true {oldest}
                """,
                params=[str(pattern)],
            ).to_arrow_table()
        located, inverse = np.unique(_locate(found), return_inverse=True)
        place = np.full(len(times), -1, dtype=np.int64)
        place[found["request"].to_numpy()] = inverse.reshape(-1)
        tables = list(_read_rows(found, located, columns))
        if not tables:  # no rows, and yet columns of the right types
            schema = pq.read_schema(min(pattern.parent.glob(pattern.name)))
            return schema.empty_table().select(list(columns)), place
        return pa.concat_tables(tables), place

    def newest_rows(
        self, view: str, *, start: datetime, end: datetime, batch_rows: int
    ) -> tuple[int, Iterator[pa.RecordBatch]]:
        """Find each key's newest row; memory is that of one row group."""
        key, pattern = self._source(view)
        with query_engine() as connection:
            found = connection.sql(
                f"""
                SELECT filename, file_row_number
                FROM read_parquet(?, filename = true, file_row_number = true)
                WHERE event_timestamp BETWEEN ? AND ?
                QUALIFY row_number() OVER (
                    PARTITION BY {key} ORDER BY event_timestamp DESC, created_timestamp DESC
                ) = 1
                """,
                params=[str(pattern), start, end],
            ).to_arrow_table()
        tables = _read_rows(found, np.sort(_locate(found)), None)
        batches = (batch for t in tables for batch in t.combine_chunks().to_batches(batch_rows))
        return found.num_rows, batches

    def parts(self, view: str) -> dict[str, list[int]]:
        """Non-empty files of the batch -> [size in bytes, change time in ns]."""
        _, pattern = self._source(view)
        return batch_parts(file_parts(pattern))

    def first_event(self, view: str, parts: Collection[str]) -> datetime:
        """Oldest event time in some files, from their statistics."""
        _, pattern = self._source(view)
        return min(oldest_event(pattern.parent / part) for part in parts)

    def ask(self, view: str, question: str) -> tuple[Any, ...]:
        """Ask DuckDB."""
        key, pattern = self._source(view)
        files = str(pattern).replace("'", "''")
        with query_engine() as connection:
            try:
                answer = connection.sql(
                    question.format(rows=f"read_parquet('{files}')", key=f'"{key}"')
                ).to_arrow_table()
            except duckdb.Error as error:
                reason = str(error).strip().splitlines()[0]
                raise StoreError(
                    f"the files of {view}, {pattern}, cannot be asked ({reason}): run "
                    f"`longtrail {STEPS.get(unversioned(view), 'sequences')}` again"
                ) from error
        return tuple(column[0].as_py() for column in answer.columns)

    def require(self, view: str) -> None:
        """Raise a :class:`MissingStepError` where the view has no file."""
        _, pattern = self._source(view)
        if not any(pattern.parent.glob(pattern.name)):
            raise missing_features(view, str(pattern.parent))

    def _source(self, view: str) -> tuple[str, Path]:
        """The view's join key, and the glob of its files."""
        applied = self._store.get_feature_view(view)
        return applied.entity_columns[0].name, Path(applied.batch_source.path)


def file_parts(pattern: Path) -> dict[str, list[int]]:
    """Non-empty parquet files of a glob -> [size in bytes, change time in ns]."""
    return {
        file.name: [file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(pattern.parent.glob(pattern.name))
        if pq.read_metadata(file).num_rows
    }


def batch_parts(parts: dict[str, list[int]]) -> dict[str, list[int]]:
    """The parts that a batch wrote: what live events brought is online since they came."""
    return {name: identity for name, identity in parts.items() if not fnmatch(name, LIVE_PARTS)}


def oldest_event(file: Path) -> datetime:
    """Oldest event time in a non-empty parquet file, from its statistics; UTC."""
    metadata = pq.read_metadata(file)
    # Leaf columns: a list column has one leaf too, under another path.
    paths = [metadata.row_group(0).column(i).path_in_schema for i in range(metadata.num_columns)]
    column = paths.index("event_timestamp")
    oldest: datetime = min(
        metadata.row_group(group).column(column).statistics.min
        for group in range(metadata.num_row_groups)
    )
    return oldest if oldest.tzinfo else oldest.replace(tzinfo=UTC)


def missing_features(view: str, where: str) -> MissingStepError:
    """The error of a view that was not built."""
    return MissingStepError(
        f"{where} holds no features of {view} yet: run "
        f"`longtrail {STEPS.get(unversioned(view), 'sequences')}` first"
    )


_FILE_BITS = 40
"""A row's place is (number of its file << 40) + number in the file: up to 10**12 rows a file."""


def _file_names(found: pa.Table) -> list[str]:
    names: list[str] = sorted(found["filename"].unique().to_pylist())
    return names


def _locate(found: pa.Table) -> NDArray[np.int64]:
    """Place of every row of ``found`` (filename, file_row_number) among all files, int64."""
    numbers = {name: number for number, name in enumerate(_file_names(found))}
    encoded = found["filename"].combine_chunks().dictionary_encode()
    of_name = np.array([numbers[n] for n in encoded.dictionary.to_pylist()], dtype=np.int64)
    files = of_name[encoded.indices.to_numpy()] if len(encoded) else np.zeros(0, dtype=np.int64)
    rows: NDArray[np.int64] = found["file_row_number"].to_numpy().astype(np.int64)
    place: NDArray[np.int64] = (files << _FILE_BITS) + rows
    return place


def _read_rows(
    found: pa.Table, located: NDArray[np.int64], columns: Sequence[str] | None
) -> Iterator[pa.Table]:
    """The rows at sorted, distinct places, a table per row group, in order."""
    for number, name in enumerate(_file_names(found)):
        first = np.searchsorted(located, number << _FILE_BITS)
        last = np.searchsorted(located, (number + 1) << _FILE_BITS)
        rows = located[first:last] - (number << _FILE_BITS)
        with pq.ParquetFile(name) as parquet:
            start = 0
            for group in range(parquet.num_row_groups):
                end = start + parquet.metadata.row_group(group).num_rows
                wanted = rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)]
                if len(wanted):
                    chosen = None if columns is None else list(columns)
                    table = parquet.read_row_group(group, columns=chosen)
                    yield table.take(pa.array(wanted - start))
                start = end
