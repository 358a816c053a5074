"""The embedding table: vectors by behaviour id, mapped from disk, shared by all readers.

It is made from the part files that encode writes, and lies beside them in ``table/``::

    ids.npy      int64 [V - L - 1], ascending
    vectors.npy  float32 [.., D]; row 0 is all zero ("no text"), row i + 1 belongs to ids[i]; behind
                 them the L live rows, then spare ones, which take no room on the disk
    live.ids     int64 [L]; ids of the live rows, in their order
    table.json   which part files it was made from

Live rows are vectors of texts that live events brought (:mod:`encoders.live_texts`); they also lie
in files beside the part files (:mod:`encoders.live_files`), until encode finds the texts in the
table of behaviours. They are only ever appended: first the vectors, then the ids, whose number
tells readers in other processes to look again (:meth:`EmbeddingTable.refreshed`). Rows never move
while a table is open: one that is made anew is another file.

Tables of several encoders lie side by side; ``encoder.json`` in a table's folder says whose it is.

Shapes: V = rows of the table, L of them live, D = width.
"""

from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from encoders.table_files import (
    NO_IDS,
    PART_FILES,
    Stamp,
    build,
    is_fresh,
    only_change,
    read_live_ids,
    stamp,
)
from feature_repo.errors import EncoderError, MissingStepError
from feature_repo.home import Home
from feature_repo.manifest import EncoderManifest, load_encoder
from feature_repo.version_names import ENCODER_FILE


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
        ids: int64 [V - L - 1], ascending, unique.
        vectors: float32 [V, D].
        fingerprint: Of the encoder.
        live_ids: int64 [L], unique, none of ``ids``.

    Raises:
        EncoderError: If the arrays do not fit each other.
    """

    def __init__(
        self,
        ids: NDArray[np.int64],
        vectors: NDArray[np.float32],
        fingerprint: str,
        live_ids: NDArray[np.int64] = NO_IDS,
    ) -> None:
        num_ids = len(ids) + len(live_ids)
        if vectors.ndim != 2 or len(vectors) != num_ids + 1:
            raise EncoderError(
                f"an embedding table with {num_ids} ids must have {num_ids + 1} vectors, got "
                f"an array of shape {vectors.shape}"
            )
        self._ids = ids
        self._live_order = np.argsort(live_ids)
        self._live_ids = live_ids[self._live_order]
        self.vectors = vectors
        self.fingerprint = fingerprint
        self._folder: Path | None = None
        self._stamp: Stamp | None = None
        self.edition: Stamp | None = None
        """Changes when the table is made anew, and with it the rows' numbers."""

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
            with only_change(folder):
                # Another process may have built it meanwhile.
                table = cls._read(folder, manifest.fingerprint)
                if table is None:
                    build(folder, manifest.fingerprint, manifest.width)
                    table = cls._read(folder, manifest.fingerprint)
        if table is None:
            raise EncoderError(
                f"the vectors in {folder} changed while they were read: run this again"
            )
        return table

    @classmethod
    def as_it_is(cls, home: Home, fingerprint: str) -> Self:
        """Map the table even where part files have come since, as while encode writes them.

        Made anew it is by whoever opens it: encode itself, before it ends. Whoever takes live
        events has no time for that, and needs no more than the table that serves.

        Raises:
            MissingStepError: If nothing has been encoded.
            EncoderError: If there are no vectors of this encoder.
        """
        table = cls._map(home.embeddings / fingerprint, fingerprint)
        return cls.open(home, fingerprint=fingerprint) if table is None else table

    @classmethod
    def _read(cls, folder: Path, fingerprint: str) -> Self | None:
        """Map the table, or None if it is not there or not made from the present part files."""
        return cls._map(folder, fingerprint) if is_fresh(folder, fingerprint) else None

    @classmethod
    def _map(cls, folder: Path, fingerprint: str) -> Self | None:
        """Map the table as it is; None if it is not there, as while it is being replaced."""
        path = folder / "table"
        before, edition = stamp(folder), stamp(folder, "ids.npy")
        try:
            # Copy-on-write instead of read-only: torch.from_numpy wants arrays that are writable.
            # Rows that were announced never change in the file.
            vectors = np.load(path / "vectors.npy", mmap_mode="c")
            ids = np.load(path / "ids.npy", mmap_mode="c")
            live_ids = read_live_ids(path)
        except FileNotFoundError:
            return None
        num_rows = len(ids) + len(live_ids) + 1
        if len(vectors) < num_rows or stamp(folder) != before:  # replaced meanwhile
            return None
        table = cls(ids, vectors[:num_rows], fingerprint, live_ids)
        table._folder, table._stamp, table.edition = folder, before, edition
        return table

    def refreshed(self) -> Self:
        """The table with the live rows that other processes have added: this one where none are.

        Cheap enough for every request: one ``stat``, 2 microseconds, where nothing is new, else
        the files are mapped again, 0.3 ms. Whoever keeps row numbers looks them up again when
        :attr:`edition` is another one; until then rows are only added.
        """
        if self._folder is None or stamp(self._folder) == self._stamp:
            return self
        # While the folder is being replaced, the mapped files are as good as before.
        return self._map(self._folder, self.fingerprint) or self

    def __len__(self) -> int:
        """V, the all-zero row included."""
        return len(self.vectors)

    @property
    def width(self) -> int:
        """D."""
        return int(self.vectors.shape[1])

    @property
    def ids(self) -> NDArray[np.int64]:
        """int64 [V - 1]; ``ids[i]`` is at row ``i + 1``. Ascending, but for the L live ones."""
        if not len(self._live_ids):
            return self._ids
        live_ids = np.empty_like(self._live_ids)
        live_ids[self._live_order] = self._live_ids
        return np.concatenate([self._ids, live_ids])

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
        rows, found = _find(self._ids, ids)
        rows = np.where(found, rows + 1, 0)
        if len(self._live_ids):
            places, found = _find(self._live_ids, ids)
            live = self._live_order[np.minimum(places, len(self._live_ids) - 1)]
            rows = np.where(found, live + len(self._ids) + 1, rows)
        return rows

    def directions(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors of rows [R] at unit length, float32 [R, D]; zero for row 0."""
        return unit_length(self._taken(rows))

    def cosines(self, rows: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.float32]:
        """Cosines of the vectors of rows [R] with those of others [O], float32 [R, O]; 0 for row 0.

        Cost: R O D. The products are scaled, which are fewer than the vectors' values.
        """
        vectors, other_vectors = self._taken(rows), self._taken(others)
        products: NDArray[np.float32] = vectors @ other_vectors.T
        products /= _lengths(vectors)[:, None]
        products /= _lengths(other_vectors)
        return products

    def _taken(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.asarray(self.vectors).take(rows, axis=0).astype(np.float32, copy=False)


def unit_length(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors [R, D] at unit length, in place; zero where they are."""
    vectors /= _lengths(vectors)[:, None]
    return vectors


def _lengths(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of vectors [R, D]; 1 of those that are zero."""
    lengths: NDArray[np.float32] = np.sqrt(np.einsum("rd,rd->r", vectors, vectors))
    lengths[lengths == 0] = 1
    return lengths


def _find(
    sorted_ids: NDArray[np.int64], ids: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Places of ids of any shape in an ascending array, and whether they are there."""
    if not len(sorted_ids):
        return np.zeros(ids.shape, dtype=np.int64), np.zeros(ids.shape, dtype=bool)
    places = np.searchsorted(sorted_ids, ids)
    return places, sorted_ids[np.minimum(places, len(sorted_ids) - 1)] == ids
