"""Texts never seen before, encoded on the spot by the shallow half of one encoder.

The vector goes to the online store, the text to the log of texts, then the vector to
a file beside the encoder's part files (the offline store) and to the memory-mapped table
of every process. The table comes last: a text that is in it is everywhere. What a kill leaves
undone is done when the event, which nobody answered for, comes again. Other encoders that the home
keeps get their vectors with their next ``longtrail encode``: nobody serves them now.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from encoders.encode import SCHEMA, TIME, embedding_rows
from encoders.live_files import add_live, live_rows, newest_live_rows
from encoders.pretrained import quiet_transformers
from encoders.table import EmbeddingTable, table_encoder
from encoders.table_files import add_rows, only_change
from encoders.text_encoder import TextEncoder
from feature_repo.behavior import hash63_array
from feature_repo.errors import EncoderError
from feature_repo.home import Home
from feature_repo.text_log import TextLog

logger = logging.getLogger(__name__)

PushRows = Callable[[pa.Table], None]
"""Writes rows of an encoder's view into the online store."""


class LiveTexts:
    """Gives every behaviour text a vector of one encoder; safe for threads and processes.

    Args:
        home: Where the vectors are.
        encoder: Encodes texts; loads its model no later than with the first of them.
        push: Writes vectors into the online store.
    """

    def __init__(self, home: Home, encoder: "LazyEncoder", push: PushRows) -> None:
        self._home = home
        self._encoder = encoder
        self.fingerprint = encoder.fingerprint
        self._push = push
        self._log = TextLog(home.live_texts)
        self._lock = threading.Lock()
        self._table = EmbeddingTable.as_it_is(home, encoder.fingerprint)

    @classmethod
    def open(cls, home: Home, fingerprint: str, push: PushRows) -> Self:
        """Open for the encoder of a table, and finish what a process that was killed began.

        Raises:
            MissingStepError: If nothing has been encoded.
            EncoderError: If there are no vectors of this encoder.
            StoreError: If the online store does not answer.
        """
        live = recover_live(home, fingerprint, SCHEMA)
        if live.num_rows:  # the view may not have been applied when they came
            push(live)
        return cls(home, LazyEncoder(home, fingerprint), push)

    def warm_up(self) -> None:
        """Load the encoder's model now, so that the first unseen text takes milliseconds.

        Raises:
            EncoderError: If it cannot be loaded.
        """
        self._encoder.load()

    def add(self, texts: Mapping[str, int]) -> dict[str, str]:
        """Make sure that texts have vectors; microseconds where they have.

        Args:
            texts: Normalised text -> epoch microseconds of its first event.

        Returns:
            Text -> the sentence why it can have no vector, for those that cannot.

        Raises:
            EncoderError: If the encoder's model cannot be loaded.
            StoreError: If the online store does not answer; then no text has been added.
        """
        ids = hash63_array(texts)
        self._table = self._table.refreshed()
        if (self._table.rows(ids) > 0).all():
            return {}
        with self._lock:
            self._table = self._table.refreshed()
            unknown = [
                text for text, row in zip(texts, self._table.rows(ids), strict=True) if row == 0
            ]
            vectors, failed = self._encode(unknown)
            if vectors:
                rows = embedding_rows(
                    pa.array(hash63_array(vectors)),
                    np.stack(list(vectors.values())),
                    self._encoder.fingerprint,
                    pa.array([texts[text] for text in vectors], pa.int64()).cast(TIME),
                )
                self._push(rows)
                self._log.add(vectors)
                append_live(self._home, self._encoder.fingerprint, rows)
                logger.info("%d texts never seen before were encoded", len(vectors))
        return failed

    def _encode(self, texts: list[str]) -> tuple[dict[str, NDArray[np.float32]], dict[str, str]]:
        """Vectors by text, and sentences by text that has none; all at once where all have."""
        encoder = self._encoder.load()
        try:
            return dict(zip(texts, encoder.encode(texts), strict=True)), {}
        except EncoderError:
            vectors, failed = {}, {}
            for text in texts:
                try:
                    (vectors[text],) = encoder.encode([text])
                except EncoderError as error:
                    failed[text] = str(error)
            return vectors, failed


class LazyEncoder:
    """The encoder of a table, whose model is loaded once, when it is first needed.

    Args:
        home: Where the table is.
        fingerprint: Of the encoder.

    Raises:
        EncoderError: If there are no vectors of this encoder.
    """

    def __init__(self, home: Home, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self._manifest = table_encoder(home, fingerprint)
        self._lock = threading.Lock()
        self._encoder: TextEncoder | None = None

    def load(self) -> TextEncoder:
        """The encoder; a second for a small model, the first time.

        Raises:
            EncoderError: If its model cannot be loaded, or is another than that of the vectors.
        """
        with self._lock:
            if self._encoder is None:
                with quiet_transformers():
                    self._encoder = TextEncoder.load(self._manifest)
            return self._encoder


def append_live(home: Home, fingerprint: str, rows: pa.Table) -> None:
    """Add live rows to their files and the table, durably; one process at a time.

    Cost: that of the rows and of one file, however many live rows there are.

    Args:
        home: The home folder.
        fingerprint: Of the encoder.
        rows: behavior_id, embedding, encoder_fingerprint and both times, as encode writes them;
            those that the table has already are passed over.

    Raises:
        MissingStepError: If nothing has been encoded.
        EncoderError: If there are no vectors of this encoder.
    """
    folder = home.embeddings / fingerprint
    table = EmbeddingTable.as_it_is(home, fingerprint)
    with only_change(folder):
        table = table.refreshed()
        # What a writer that was killed between the two left.
        left = _without(newest_live_rows(folder, rows.schema), table)
        known = np.isin(rows["behavior_id"].to_numpy(), left["behavior_id"].to_numpy())
        new = _without(rows.filter(pa.array(~known)), table)
        if new.num_rows:
            add_live(folder, new)
        add_rows(folder, fingerprint, pa.concat_tables([left, new]), len(table))


def recover_live(home: Home, fingerprint: str, schema: pa.Schema) -> pa.Table:
    """Finish in the table what a writer that was killed began.

    Args:
        home: The home folder.
        fingerprint: Of the encoder.
        schema: Of the rows of :func:`append_live`.

    Returns:
        All live rows.

    Raises:
        MissingStepError: If nothing has been encoded.
        EncoderError: If there are no vectors of this encoder.
    """
    folder = home.embeddings / fingerprint
    table = EmbeddingTable.as_it_is(home, fingerprint)
    with only_change(folder):
        table = table.refreshed()
        live = live_rows(folder, schema)
        add_rows(folder, fingerprint, _without(live, table), len(table))
    return live


def _without(rows: pa.Table, table: EmbeddingTable) -> pa.Table:
    """The rows that a table does not have."""
    return rows.filter(pa.array(table.rows(rows["behavior_id"].to_numpy()) == 0))
