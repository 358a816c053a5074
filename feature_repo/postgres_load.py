"""Files of the home into PostgreSQL: the offline store of the production profile.

Every feature view and every canonical table has a table there, with the columns of its files and
``longtrail_part``, the file that a row came from. ``longtrail_parts`` says which state of which
file is loaded. From the two the next run tells what to do:

- Files only came: each is copied in a transaction of its own, so a run that is killed loses at most
  one of them.
- A loaded file changed or is gone: the whole difference is one transaction, so no reader ever sees
  a hole or a row twice.
- Nothing that is loaded holds any more, or the columns changed: the table is built anew beside the
  old one, which it replaces in one moment.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from psycopg import sql

from feature_repo.errors import StoreError
from feature_repo.home import Home
from feature_repo.offline_files import file_parts, oldest_event
from feature_repo.offline_postgres import PART_COLUMN, PARTS_TABLE, loaded_parts
from feature_repo.postgres_binary import HEADER, TRAILER, encode
from feature_repo.postgres_session import Database, Session, columns_of
from feature_repo.postgres_tables import (
    LoadTable,
    canonical_tables,
    create_table,
    replace_table,
    view_tables,
)
from feature_repo.progress import Progress, ProgressBars, no_bars

logger = logging.getLogger(__name__)

_THEN = (
    "check the server and DATABASE_URL, then run this again; nothing is lost, what is missing in "
    "PostgreSQL is loaded then"
)
_BATCH_ROWS = 4096
"""Rows read from a file at once: 20 MB for six lists of 100 numbers, beside a row group's pages."""
_CREATE_PARTS = f"""
CREATE TABLE IF NOT EXISTS {PARTS_TABLE} (
    table_name text NOT NULL,
    part text NOT NULL,
    identity bigint[] NOT NULL,
    num_rows bigint NOT NULL,
    first_event timestamptz,
    loaded_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (table_name, part)
);
COMMENT ON TABLE {PARTS_TABLE} IS 'Files of the home folder that are loaded, by table.';
COMMENT ON COLUMN {PARTS_TABLE}.table_name IS 'Table that holds the rows.';
COMMENT ON COLUMN {PARTS_TABLE}.part IS 'File name; the rows carry it in {PART_COLUMN}.';
COMMENT ON COLUMN {PARTS_TABLE}.identity IS 'Size of the file in bytes, change time in ns.';
COMMENT ON COLUMN {PARTS_TABLE}.num_rows IS 'Rows of the file.';
COMMENT ON COLUMN {PARTS_TABLE}.first_event IS 'Oldest event_timestamp in the file.';
COMMENT ON COLUMN {PARTS_TABLE}.loaded_at IS 'When the file was loaded.';
"""

_FAST_COMPRESSION = """
SELECT set_config('default_toast_compression', 'lz4', false) FROM pg_settings
WHERE name = 'default_toast_compression' AND 'lz4' = ANY (enumvals)
"""
"""Long lists are compressed; the older method, on servers without lz4, takes twice the time."""


@dataclass(frozen=True)
class LoadedTable:
    """What a load did to a table.

    Args:
        name: The table.
        num_rows: Rows copied.
        num_parts: Files copied.
        num_removed: Loaded files whose rows were removed, changed ones included.
        seconds: Wall-clock time.
    """

    name: str
    num_rows: int
    num_parts: int
    num_removed: int
    seconds: float


@dataclass(frozen=True)
class _Difference:
    """Files of the home against the parts of a table."""

    removed: tuple[str, ...]
    added: tuple[str, ...]
    anew: bool
    """No loaded row can stay."""


def load_tables(
    home: Home, database: Database, *, bars: ProgressBars = no_bars
) -> list[LoadedTable]:
    """Bring PostgreSQL's tables up to the files of the home; unchanged ones are left alone.

    A second load at the same time waits for the first.

    Args:
        home: Where the files are.
        database: The profile's.
        bars: Opens a progress bar for a table; receives its rows.

    Returns:
        The tables that changed.

    Raises:
        StoreError: If the server cannot be reached or refuses, or a file goes away meanwhile.
    """
    tables = [*canonical_tables(home), *view_tables(home)]
    loaded = []
    with database.sentences(_THEN), database.session() as session, only_load(session, database):
        session.execute(_CREATE_PARTS)
        session.execute(_FAST_COMPRESSION)
        for table in tables:
            files = file_parts(table.files)
            difference = _compare(session, table, files)
            if not difference.anew and not difference.added and not difference.removed:
                continue
            began = time.perf_counter()
            with bars(table.name) as progress:
                num_rows = _load(session, table, files, difference, progress)
            session.execute(sql.SQL("VACUUM (ANALYZE) {}").format(sql.Identifier(table.name)))
            loaded.append(
                LoadedTable(
                    table.name,
                    num_rows,
                    len(difference.added),
                    len(difference.removed),
                    time.perf_counter() - began,
                )
            )
    return loaded


@contextmanager
def only_load(session: Session, database: Database) -> Iterator[None]:
    """Wait for the right to change tables; the server gives it back where this process dies."""
    name = [f"longtrail load {database.schema}"]
    (free,) = session.execute("SELECT pg_try_advisory_lock(hashtext(%s))", name).fetchone() or (0,)
    if not free:
        logger.warning("another process loads into PostgreSQL at %s: waiting", database.place)
        session.execute("SELECT pg_advisory_lock(hashtext(%s))", name)
    yield


def _compare(session: Session, table: LoadTable, files: dict[str, list[int]]) -> _Difference:
    """What to do to a table; see the module's docstring."""
    loaded = loaded_parts(session, table.name)
    kept = {part for part, identity in loaded.items() if files.get(part) == identity}
    columns = columns_of(session, table.name)
    if columns != table.columns:
        if columns:
            logger.warning(
                "the columns of %s changed: its table in PostgreSQL is built anew", table.name
            )
        kept = set()
    return _Difference(
        removed=tuple(sorted(loaded.keys() - kept)),
        added=tuple(sorted(files.keys() - kept)),
        anew=columns != table.columns or bool(loaded and not kept),
    )


def _load(
    session: Session,
    table: LoadTable,
    files: dict[str, list[int]],
    difference: _Difference,
    progress: Progress,
) -> int:
    """Apply a difference; the rows copied."""
    total = sum(pq.read_metadata(table.files.parent / part).num_rows for part in difference.added)
    num_rows = 0

    def copy(parts: Sequence[str], target: str) -> int:
        return sum(
            _copy_part(session, table, part, files[part], target, total, progress) for part in parts
        )

    if difference.anew and difference.removed:
        beside = f"{table.name}_new"
        with session.transaction():
            create_table(session, table, beside)
            _forget(session, table.name, difference.removed)
            num_rows += copy(difference.added, beside)
            replace_table(session, table, beside)
        return num_rows
    if difference.anew:
        with session.transaction():
            create_table(session, table, table.name)
    if difference.removed:
        with session.transaction():
            _delete(session, table.name, difference.removed)
            num_rows += copy(difference.added, table.name)
        return num_rows
    for part in difference.added:
        with session.transaction():
            num_rows += copy([part], table.name)
    return num_rows


def _copy_part(
    session: Session,
    table: LoadTable,
    part: str,
    identity: list[int],
    target: str,
    total: int,
    progress: Progress,
) -> int:
    """Copy a file's rows and note its identity; one row group at a time is in memory."""
    path = table.files.parent / part
    names = [name for name in table.columns if name != PART_COLUMN]
    copy_in = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(
        sql.Identifier(target),
        sql.SQL(", ").join(sql.Identifier(name) for name in (*names, PART_COLUMN)),
    )
    num_rows = 0
    with (
        _parquet(path) as parquet,
        session.cursor() as cursor,
        cursor.copy(copy_in) as copy,
    ):
        copy.write(HEADER)
        for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=names):
            rows = batch.select(names).append_column(
                PART_COLUMN, pa.repeat(pa.scalar(part), batch.num_rows)
            )
            for block in encode(rows):
                copy.write(block)
            num_rows += batch.num_rows
            progress(batch.num_rows, total)
        copy.write(TRAILER)
    session.execute(
        sql.SQL(
            "INSERT INTO {} (table_name, part, identity, num_rows, first_event) "
            "VALUES (%s, %s, %s, %s, %s)"
        ).format(sql.Identifier(PARTS_TABLE)),
        [table.name, part, identity, num_rows, oldest_event(path) if table.has_times else None],
    )
    return num_rows


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError as error:
        raise StoreError(
            f"{path} went away while it was being loaded: another command builds it anew; run "
            "this again when that one is done"
        ) from error


def _forget(session: Session, name: str, parts: Sequence[str]) -> None:
    session.execute(
        sql.SQL("DELETE FROM {} WHERE table_name = %s AND part = ANY(%s)").format(
            sql.Identifier(PARTS_TABLE)
        ),
        [name, list(parts)],
    )


def _delete(session: Session, name: str, parts: Sequence[str]) -> None:
    """Delete the rows of parts."""
    _forget(session, name, parts)
    session.execute(
        sql.SQL("DELETE FROM {} WHERE {} = ANY(%s)").format(
            sql.Identifier(name), sql.Identifier(PART_COLUMN)
        ),
        [list(parts)],
    )
