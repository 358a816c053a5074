"""Files of the rows of live texts, beside the part files that encode writes.

``live-<n>.parquet`` holds some hundred rows. Only the newest one grows, by being put in place anew
with more rows behind the old ones: adding a text costs the same however many there are, and a row
that a reader has found stays where it is. ``live.parquet`` is of a former version.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from feature_repo.home import complete_file
from feature_repo.offline_files import LIVE_PARTS

_FULL_ROWS = 256
"""Writing so many vectors of 384 numbers anew takes 10 ms; 40,000 texts are 157 files."""
_NUMBERED = "live-*.parquet"


def live_files(folder: Path) -> list[Path]:
    """The files of an encoder's live rows."""
    return sorted(folder.glob(LIVE_PARTS))


def live_rows(folder: Path, schema: pa.Schema) -> pa.Table:
    """All rows of the files."""
    return pa.concat_tables(
        [schema.empty_table(), *(pq.read_table(path).cast(schema) for path in live_files(folder))]
    )


def newest_live_rows(folder: Path, schema: pa.Schema) -> pa.Table:
    """The rows of the newest file, which holds all that a writer that was killed may have left."""
    path = _newest(folder)
    return schema.empty_table() if path is None else pq.read_table(path).cast(schema)


def add_live(folder: Path, rows: pa.Table) -> None:
    """Add rows, durably, to the newest file, or to one more where that is full.

    Args:
        folder: The encoder's; the caller has the only right to change it.
        rows: None of which a file holds.
    """
    newest = _newest(folder)
    number = 0 if newest is None else int(newest.stem.removeprefix("live-"))
    before = newest_live_rows(folder, rows.schema)
    if before.num_rows >= _FULL_ROWS:
        number, before = number + 1, rows.schema.empty_table()
    _write(folder / f"live-{number:06d}.parquet", pa.concat_tables([before, rows]))


def drop_stored(folder: Path, stored: NDArray[np.int64]) -> None:
    """Take away the rows of behaviours with these ids; the caller has the only right to change."""
    for path in live_files(folder):
        rows = pq.read_table(path)
        is_stored = np.isin(rows["behavior_id"].to_numpy(), stored)
        if is_stored.all():
            path.unlink()
        elif is_stored.any():
            _write(path, rows.filter(pa.array(~is_stored)))


def _newest(folder: Path) -> Path | None:
    return max(folder.glob(_NUMBERED), default=None)


def _write(path: Path, rows: pa.Table) -> None:
    with complete_file(path) as part:
        # Vectors do not compress: a dictionary of floats would only cost time.
        pq.write_table(rows, part, compression="zstd", use_dictionary=["encoder_fingerprint"])
