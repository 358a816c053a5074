"""The files of the log of served requests: ``served/date=<day>/<time>-<process>.parquet``.

A file is complete or not there, and needs no other one: it can be copied or deleted alone, a day as
a folder. Several processes write side by side, each files of its own.
"""

import os
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from feature_repo.errors import MissingStepError, NothingToCompareError, StoreError
from feature_repo.home import Home, complete_file
from feature_repo.served_rows import SCHEMA, ServedRequest, from_row, to_table

# Where the same few values come again in every row. Dense values do not; as they are, those of an
# item that comes again are equal bytes for the compression.
_DICTIONARY = [
    "user_id",
    *("run", "encoder", "path", "degraded.list.element", "context_names.list.element"),
    *("scenes.list.element", "user_dense_names.list.element", "item_ids.list.element"),
    *("text_ids.list.element", "item_dense_names.list.element", "category_names.list.element"),
    *("categories.list.element", "neighbors.list.element"),
]
_BATCH_ROWS = 64
"""Rows in memory at once, of some 100 KB each."""


def write_served(folder: Path, requests: Sequence[ServedRequest]) -> None:
    """Write requests to new files of their days.

    Args:
        folder: :attr:`feature_repo.home.Home.served`.
        requests: At least one.

    Raises:
        OSError: If the disk does not take them.
    """
    days: dict[date, list[ServedRequest]] = defaultdict(list)
    for request in requests:
        days[request.served_at.date()].append(request)
    for day, of_day in days.items():
        name = f"{of_day[0].served_at:%H%M%S}-{os.getpid()}-{uuid.uuid4().hex[:8]}.parquet"
        with complete_file(folder / f"date={day.isoformat()}" / name) as part:
            pq.write_table(to_table(of_day), part, compression="zstd", use_dictionary=_DICTIONARY)
            with part.open("rb+") as file:
                os.fsync(file.fileno())  # a name must never outlive its bytes


def served_files(home: Home, *, since: date | None = None) -> list[Path]:
    """Complete files of the log, oldest day first.

    Args:
        home: Whose log.
        since: First day, UTC; None for all.

    Raises:
        MissingStepError: If nothing was ever logged.
        NothingToCompareError: If there is a log, and nothing in it of these days.
    """
    files = [
        file
        for file in sorted(home.served.glob("date=*/*.parquet"))
        if since is None or file.parent.name >= f"date={since.isoformat()}"
    ]
    if not files and not home.served.exists():
        raise MissingStepError(
            f"no served request is logged in {home.served}: run `longtrail serve --served-log "
            "0.1`, ask for rankings, and wait a minute until they are written"
        )
    if not files:
        when = f" since {since}" if since else ""
        raise NothingToCompareError(f"no served request is logged in {home.served}{when}")
    return files


def request_ids(file: Path) -> list[str]:
    """Ids of a file's requests, in its order.

    Raises:
        StoreError: If the file cannot be read.
    """
    with _opened(file) as parquet:
        ids: list[str] = parquet.read(["request_id"])["request_id"].to_pylist()
    return ids


def read_served(file: Path, wanted: set[str]) -> Iterator[ServedRequest]:
    """Requests of a file, by their ids.

    Args:
        file: Of :func:`served_files`.
        wanted: Ids; others are passed over.

    Raises:
        StoreError: If the file cannot be read.
    """
    with _opened(file) as parquet:
        for batch in parquet.iter_batches(batch_size=_BATCH_ROWS):
            ids = batch.column("request_id").to_pylist()
            for place in (place for place, name in enumerate(ids) if name in wanted):
                yield from_row({name: batch.column(name)[place] for name in batch.schema.names})


@contextmanager
def _opened(file: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(file) as parquet:
            if not parquet.schema_arrow.equals(SCHEMA):
                raise StoreError(
                    f"{file} is not of the form that this version logs: move it away, or read it "
                    "with the version that wrote it"
                )
            yield parquet
    except (OSError, pa.ArrowInvalid) as error:
        raise StoreError(
            f"{file} cannot be read ({str(error).splitlines()[0]}): move it away, then run this "
            "again"
        ) from error
