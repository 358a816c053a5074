"""The embedding table: vectors by behaviour id, mapped from disk, shared by all readers.

It is made from the part files that encode writes, and lies beside them in ``table/``::

    ids.npy      int64 [V - 1], ascending
    vectors.npy  float32 [V, D]; row 0 is all zero ("no text"), row i + 1 belongs to ids[i]
    table.json   which part files it was made from

Tables of several encoders lie side by side; ``encoder.json`` in a table's folder says whose it is.

Shapes: V = rows of the table, D = width.
"""

import json
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from feature_repo.errors import EncoderError, MissingStepError
from feature_repo.home import Home, complete_folder, write_json
from feature_repo.manifest import EncoderManifest, load_encoder
from feature_repo.version_names import ENCODER_FILE

PART_FILES = "part-*.parquet"
_LOCK_TIMEOUT_S = 600.0
"""Building takes seconds per million vectors; whoever waits longer waits for a hanging process."""


def table_encoder(home: Home, fingerprint: str | None = None) -> EncoderManifest:
    """The encoder of a table in ``home``.

    Args:
        home: The home folder.
        fingerprint: Of the encoder; None = the current one.

    Raises:
        MissingStepError: If nothing has been encoded.
        EncoderError: If there are no vectors of this encoder.
    """
    current = load_encoder(home)
    if fingerprint in (None, current.fingerprint):
        return current
    path = home.embeddings / str(fingerprint) / ENCODER_FILE
    if not path.exists():
        raise EncoderError(
            f"expected vectors of encoder {fingerprint}, but those in {home.root} are of "
            f"encoder {current.fingerprint} ({current.model}, layer {current.split_layer}): run "
            "`longtrail encode` with the former settings, or train again on the new vectors"
        )
    return EncoderManifest.load(path, made_by="longtrail encode")


def table_encoders(home: Home) -> list[EncoderManifest]:
    """The encoders whose tables ``home`` holds, by fingerprint."""
    return [
        EncoderManifest.load(path, made_by="longtrail encode")
        for path in sorted(home.embeddings.glob(f"*/{ENCODER_FILE}"))
    ]


class EmbeddingTable:
    """Vectors of one encoder's behaviours; :meth:`open` finds and, where stale, builds them.

    Args:
        ids: int64 [V - 1], ascending, unique.
        vectors: float32 [V, D].
        fingerprint: Of the encoder.

    Raises:
        EncoderError: If the arrays do not fit each other.
    """

    def __init__(
        self, ids: NDArray[np.int64], vectors: NDArray[np.float32], fingerprint: str
    ) -> None:
        if vectors.ndim != 2 or len(vectors) != len(ids) + 1:
            raise EncoderError(
                f"an embedding table with {len(ids)} ids must have {len(ids) + 1} vectors, got "
                f"an array of shape {vectors.shape}"
            )
        self._ids = ids
        self.vectors = vectors
        self.fingerprint = fingerprint

    @classmethod
    def open(cls, home: Home, *, fingerprint: str | None = None) -> Self:
        """Open the table of an encoder, making it anew where part files have come.

        Args:
            home: The home folder.
            fingerprint: Of the encoder whose vectors the caller was trained on; None = the current
                one's.

        Raises:
            MissingStepError: If nothing has been encoded.
            EncoderError: If there are no vectors of this encoder, or a part file is another's.
        """
        manifest = table_encoder(home, fingerprint)
        folder = home.embeddings / manifest.fingerprint
        if not any(folder.glob(PART_FILES)):
            raise MissingStepError(f"{folder} holds no vectors: run `longtrail encode` first")
        table = cls._read(folder, manifest.fingerprint)
        if table is None:
            with FileLock(folder / ".table.lock", timeout=_LOCK_TIMEOUT_S):
                table = cls._read(
                    folder, manifest.fingerprint
                )  # another process may have built it meanwhile
                if table is None:
                    _build(folder, manifest.fingerprint, manifest.width)
                    table = cls._read(folder, manifest.fingerprint)
        if table is None:
            raise EncoderError(
                f"the vectors in {folder} changed while they were read: run this again"
            )
        return table

    @classmethod
    def _read(cls, folder: Path, fingerprint: str) -> Self | None:
        """Map the table, or None if it is not there or not made from the present part files."""
        table = folder / "table"
        source = _source(folder, fingerprint)
        try:
            if json.loads((table / "table.json").read_text(encoding="utf-8")) != source:
                return None
            # Copy-on-write instead of read-only: torch.from_numpy wants arrays that are writable.
            # The file itself never changes.
            vectors = np.load(table / "vectors.npy", mmap_mode="c")
            ids = np.load(table / "ids.npy", mmap_mode="c")
        except FileNotFoundError:
            return None
        return cls(ids, vectors, fingerprint) if len(vectors) == len(ids) + 1 else None

    def __len__(self) -> int:
        """V, the all-zero row included."""
        return len(self.vectors)

    @property
    def width(self) -> int:
        """D."""
        return int(self.vectors.shape[1])

    @property
    def ids(self) -> NDArray[np.int64]:
        """int64 [V - 1], ascending; ``ids[i]`` is at row ``i + 1``."""
        return self._ids

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Find the rows of behaviours; O(log V) each.

        Args:
            ids: int64 of any shape.

        Returns:
            int64 of the same shape; 0 where the id is 0 or has no vector.

        Raises:
            ValueError: If the ids are no integers: above 2**53 a float has lost the last digits.
        """
        ids = np.asarray(ids)
        if ids.dtype != np.int64:
            raise ValueError(f"behaviour ids must be int64, got {ids.dtype}")
        if not len(self._ids):
            return np.zeros(ids.shape, dtype=np.int64)
        places = np.searchsorted(self._ids, ids)
        found = self._ids[np.minimum(places, len(self._ids) - 1)] == ids
        return np.where(found, places + 1, 0)

    def directions(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors of rows [R] at unit length, float32 [R, D]; zero for row 0."""
        vectors = np.asarray(self.vectors).take(rows, axis=0).astype(np.float32, copy=False)
        lengths = np.sqrt((vectors * vectors).sum(axis=1, keepdims=True))
        lengths[lengths == 0] = 1
        vectors /= lengths
        return vectors


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


def _build(folder: Path, fingerprint: str, width: int) -> None:
    """Write the table from the part files; memory holds the ids and one part's vectors."""
    source = _source(folder, fingerprint)
    ids = np.unique(np.concatenate([np.empty(0, dtype=np.int64), stored_ids(folder)]))
    with complete_folder(folder / "table") as part:
        np.save(part / "ids.npy", ids)
        vectors = open_memmap(
            part / "vectors.npy", mode="w+", dtype=np.float32, shape=(len(ids) + 1, width)
        )  # a new file reads as zeros, so row 0 is ready
        for name, _, _ in source["parts"]:
            part_ids, part_vectors = _read_part(folder / name, fingerprint, width)
            vectors[np.searchsorted(ids, part_ids) + 1] = part_vectors
        vectors.flush()
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
    lists: pa.ListArray = table["embedding"].combine_chunks()
    if not pc.all(pc.equal(pc.list_value_length(lists), width)).as_py():
        raise EncoderError(
            f"{path} holds vectors that are not {width} long: move the file away and run "
            "`longtrail encode` again"
        )
    values = lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return table["behavior_id"].to_numpy(), values
