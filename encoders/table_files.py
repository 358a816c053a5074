"""The files of an embedding table: made from encode's part files, and live rows behind them.

See :mod:`encoders.table` for what lies where. Shapes: V = rows of the table, D = width.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from encoders.live_files import drop_stored, live_files
from feature_repo.errors import EncoderError
from feature_repo.home import complete_folder, write_json

PART_FILES = "part-*.parquet"
SPARE_ROWS = 65_536
"""Texts that live events can bring before the table is made anew with more room."""
_LIVE_IDS = "live.ids"
NO_IDS: NDArray[np.int64] = np.empty(0, dtype=np.int64)
_LOCK_TIMEOUT_S = 600.0
"""Building takes seconds per million vectors; whoever waits longer waits for a hanging process."""


def drop_live(folder: Path) -> None:
    """Forget the live rows of texts that the part files hold by now."""
    with only_change(folder):
        if live_files(folder):
            drop_stored(folder, stored_ids(folder))


def add_rows(folder: Path, fingerprint: str, rows: pa.Table, num_rows: int) -> None:
    """Write vectors behind the last row of a table, then their ids, which makes them count.

    Args:
        folder: The encoder's; the caller holds :func:`only_change`.
        fingerprint: Of the encoder.
        rows: behavior_id and embedding, none of which the table has.
        num_rows: V.
    """
    if not rows.num_rows:
        return
    vectors = np.load(folder / "table" / "vectors.npy", mmap_mode="r+")
    width, end = int(vectors.shape[1]), num_rows + rows.num_rows
    if end > len(vectors) or not (folder / "table" / _LIVE_IDS).exists():
        build(folder, fingerprint, width)
        return
    vectors[num_rows:end] = _vectors(rows, width)
    vectors.flush()
    with (folder / "table" / _LIVE_IDS).open("r+b") as file:
        # Whole ids: a writer that was killed may have left a part of one.
        file.seek(len(read_live_ids(folder / "table")) * NO_IDS.itemsize)
        file.write(rows["behavior_id"].to_numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())


def read_live_ids(table: Path) -> NDArray[np.int64]:
    """Ids of the live rows; none in a table that a former version made."""
    path = table / _LIVE_IDS
    if not path.exists():
        return NO_IDS
    data = path.read_bytes()
    return np.frombuffer(data[: len(data) // 8 * 8], dtype=np.int64)


Stamp = tuple[int, int, int]


def stamp(folder: Path, name: str = _LIVE_IDS) -> Stamp | None:
    """Changes with a file of the table: when live rows come, or the table is made anew."""
    try:
        status = os.stat(f"{folder}/table/{name}")  # noqa: PTH116  # in every request
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def only_change(folder: Path) -> Iterator[None]:
    """The only right to change the table of an encoder, across processes."""
    with FileLock(folder / ".table.lock", timeout=_LOCK_TIMEOUT_S):
        yield


def is_fresh(folder: Path, fingerprint: str) -> bool:
    """Whether there is a table made from the present part files."""
    path = folder / "table" / "table.json"
    try:
        made_of = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    return bool(made_of == _source(folder, fingerprint))


def stored_ids(folder: Path) -> NDArray[np.int64]:
    """Read the ids of all part files of one encoder: int64 [number of rows]."""
    return _stored(folder, "behavior_id")


def stored_times(folder: Path) -> NDArray[np.int64]:
    """Read from when on each row of all part files can be read: epoch microseconds [rows]."""
    return _stored(folder, "event_timestamp")


def _stored(folder: Path, column: str) -> NDArray[np.int64]:
    return np.concatenate(
        [np.empty(0, dtype=np.int64)]
        + [
            pq.read_table(path, columns=[column])[column].cast(pa.int64()).to_numpy()
            for path in sorted(folder.glob(PART_FILES))
        ]
    )


def _source(folder: Path, fingerprint: str) -> dict[str, Any]:
    """Describe what a table of the present part files is made from."""
    stats = [(path.name, path.stat()) for path in sorted(folder.glob(PART_FILES))]
    parts = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return {"fingerprint": fingerprint, "parts": parts}


def build(folder: Path, fingerprint: str, width: int) -> None:
    """Write the table from the part files; memory holds the ids and one part's vectors."""
    source = _source(folder, fingerprint)
    ids = np.unique(np.concatenate([NO_IDS, stored_ids(folder)]))
    live_parts = [_read_part(path, fingerprint, width) for path in live_files(folder)]
    live_ids = np.concatenate([NO_IDS, *(part_ids for part_ids, _ in live_parts)])
    live_vectors = np.concatenate(
        [np.empty((0, width), np.float32), *(part_vectors for _, part_vectors in live_parts)]
    )
    distinct = np.sort(np.unique(live_ids, return_index=True)[1])
    new = distinct[~np.isin(live_ids[distinct], ids)]
    live_ids, live_vectors = live_ids[new], live_vectors[new]
    num_rows = len(ids) + len(live_ids) + 1
    with complete_folder(folder / "table") as part:
        np.save(part / "ids.npy", ids)
        vectors = open_memmap(
            part / "vectors.npy", mode="w+", dtype=np.float32, shape=(num_rows + SPARE_ROWS, width)
        )  # a new file reads as zeros, so row 0 is ready
        for name, _, _ in source["parts"]:
            part_ids, part_vectors = _read_part(folder / name, fingerprint, width)
            vectors[np.searchsorted(ids, part_ids) + 1] = part_vectors
        if len(live_ids):
            vectors[len(ids) + 1 : num_rows] = live_vectors
        vectors.flush()
        (part / _LIVE_IDS).write_bytes(live_ids.tobytes())
        write_json(part / "table.json", source)


def _read_part(
    path: Path, fingerprint: str, width: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Read one part file; refuse it if it is another encoder's."""
    table = pq.read_table(path, columns=["behavior_id", "embedding", "encoder_fingerprint"])
    encoders = pc.unique(table["encoder_fingerprint"]).to_pylist()
    if encoders != [fingerprint]:
        raise EncoderError(
            f"{path} holds vectors of encoder {', '.join(map(str, encoders))}, expected "
            f"{fingerprint}: vectors of two encoders are never mixed; move the file away"
        )
    lengths = pc.list_value_length(table["embedding"])
    if not pc.all(pc.equal(lengths, width)).as_py():
        raise EncoderError(
            f"{path} holds vectors that are not {width} long: move the file away and run "
            "`longtrail encode` again"
        )
    return table["behavior_id"].to_numpy(), _vectors(table, width)


def _vectors(rows: pa.Table, width: int) -> NDArray[np.float32]:
    """The vectors of rows, float32 [rows, D]."""
    lists: pa.ListArray = rows["embedding"].combine_chunks()
    values: NDArray[np.float32] = lists.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, width)
