"""Step ``encode``: every distinct behaviour text becomes a vector, once per encoder.

The vectors of an encoder lie in ``behavior_embeddings/<fingerprint>/part-<n>.parquet``, an offline
store as Feast reads it; ``encoder.json`` beside it says whose they are. Files are only ever
added, so a kill loses at most the one being made.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from encoders.config import EncoderConfig
from encoders.fingerprint import describe_encoder
from encoders.pretrained import quiet_transformers
from encoders.table import EmbeddingTable
from encoders.table_files import PART_FILES, drop_live, stored_ids, stored_times
from encoders.text_encoder import TextEncoder, check_finite
from feature_repo.errors import MissingStepError
from feature_repo.home import Home, complete_file
from feature_repo.manifest import EncoderManifest, load_encoder
from feature_repo.progress import Progress, silent
from feature_repo.version_names import ENCODER_FILE

TIME = pa.timestamp("us", tz="UTC")
SCHEMA = pa.schema(
    [
        pa.field("behavior_id", pa.int64(), nullable=False),
        pa.field("embedding", pa.list_(pa.float32()), nullable=False),
        pa.field("encoder_fingerprint", pa.string(), nullable=False),
        pa.field("event_timestamp", TIME, nullable=False),
        pa.field("created_timestamp", TIME, nullable=False),
    ]
)
"""Of a part file. Both times are the text's first appearance: a vector depends on nothing later."""
_CHUNK_TEXTS = 8192
"""Texts tokenised at once; the tokenizer spreads them over the cores."""


@dataclass(frozen=True)
class EncodeSummary:
    """What a run of encode did."""

    manifest: EncoderManifest
    num_behaviors: int
    """Distinct texts of the data set."""
    num_new: int
    """Texts encoded by this run."""
    num_at_limit: int
    """Of those, texts of ``max_tokens`` tokens: cut off there, or just so long."""
    texts_per_s: float | None
    """From text to file, without loading the model; None if nothing was new."""
    seconds: float
    """Everything included."""


def encode_behaviors(
    home: Home, config: EncoderConfig, progress: Progress = silent
) -> EncodeSummary:
    """Encode the texts that this encoder has not encoded yet, and make it the current encoder.

    Args:
        home: The home folder; ingest has been run.
        config: The encoder.
        progress: Told the number of texts done.

    Raises:
        MissingStepError: If there are no behaviours.
        EncoderError: If the model cannot be used, or a text gets no finite vector.
        LongtrailError: If another process is encoding.
    """
    started = time.perf_counter()
    with home.lock("embeddings"):
        if not home.behaviors.exists():
            raise MissingStepError(f"{home.behaviors} does not exist: run `longtrail ingest` first")
        manifest = describe_encoder(config)
        folder = home.embeddings / manifest.fingerprint
        behaviors = pq.read_table(home.behaviors, columns=["behavior_id", "text", "first_seen"])
        missing = behaviors.filter(pa.array(~_is_stored(behaviors, folder)))
        num_at_limit, texts_per_s = 0, None
        if missing.num_rows:
            with quiet_transformers():
                encoder = TextEncoder.load(manifest, batch_tokens=config.batch_tokens)
                encoding = time.perf_counter()
                num_at_limit = _encode(encoder, missing, folder, config.part_texts, progress)
            texts_per_s = missing.num_rows / (time.perf_counter() - encoding)
        if not (folder / ENCODER_FILE).exists():
            manifest.save(folder / ENCODER_FILE)
        if not home.encoder.exists() or load_encoder(home) != manifest:
            manifest.save(home.encoder)
        drop_live(folder)
        if behaviors.num_rows:
            EmbeddingTable.open(home)  # built now, so that no reader has to
    return EncodeSummary(
        manifest=manifest,
        num_behaviors=behaviors.num_rows,
        num_new=missing.num_rows,
        num_at_limit=num_at_limit,
        texts_per_s=texts_per_s,
        seconds=time.perf_counter() - started,
    )


def _encode(
    encoder: TextEncoder, missing: pa.Table, folder: Path, part_texts: int, progress: Progress
) -> int:
    """Encode ``missing`` into part files; return how many texts are as long as is allowed."""
    num_texts = missing.num_rows
    tokens = encoder.tokenize(
        missing["text"].slice(start, _CHUNK_TEXTS).to_pylist()
        for start in range(0, num_texts, _CHUNK_TEXTS)
    )
    ids = missing["behavior_id"].to_numpy()
    # Shortest first, so that a part needs few different batch shapes; ties by id, so that a run
    # that resumes after a kill makes the parts that the killed run would have made.
    order = np.lexsort((ids, tokens.lengths))
    number = _next_number(folder)
    for part, start in enumerate(range(0, num_texts, part_texts)):
        rows = order[start : start + part_texts]
        vectors = encoder.encode_tokens(tokens, rows, lambda done: progress(done, num_texts))
        chosen = missing.take(pa.array(rows))
        check_finite(vectors, lambda row, texts=chosen["text"]: texts[row].as_py())  # type: ignore[misc]
        _write_part(
            folder / f"part-{number + part:05d}.parquet",
            chosen,
            vectors,
            encoder.manifest.fingerprint,
        )
    return int((tokens.lengths == encoder.manifest.max_tokens).sum())


def _is_stored(behaviors: pa.Table, folder: Path) -> NDArray[np.bool_]:
    """Which behaviours have a row that can be read from their first moment on.

    An older log, or another data set, may bring a text that so far was first seen later: a row with
    the later time would be of the future for it, so it gets one more, with the same vector.
    """
    wanted = behaviors["behavior_id"].to_numpy()
    ids, times = stored_ids(folder), stored_times(folder)
    order = np.lexsort((times, ids))
    ids, times = ids[order], times[order]
    if not len(ids):
        return np.zeros(len(wanted), dtype=bool)
    place = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)  # the earliest of equal ids
    first_seen = behaviors["first_seen"].cast(TIME).cast(pa.int64()).to_numpy()
    stored: NDArray[np.bool_] = (ids[place] == wanted) & (times[place] <= first_seen)
    return stored


def _next_number(folder: Path) -> int:
    numbers = [int(path.stem.removeprefix("part-")) for path in folder.glob(PART_FILES)]
    return max(numbers, default=-1) + 1


def embedding_rows(
    ids: pa.Array | pa.ChunkedArray,
    vectors: NDArray[np.float32],
    fingerprint: str,
    first_seen: pa.Array | pa.ChunkedArray,
) -> pa.Table:
    """Rows of an encoder's view (:data:`SCHEMA`).

    Args:
        ids: n behaviour ids.
        vectors: float32 [n, D].
        fingerprint: Of the encoder.
        first_seen: n times of the texts' first appearance.
    """
    num_texts, width = vectors.shape
    offsets = pa.array(np.arange(num_texts + 1, dtype=np.int32) * width)
    return pa.table(
        [
            ids,
            pa.ListArray.from_arrays(offsets, pa.array(vectors.ravel())),
            pa.repeat(fingerprint, num_texts),
            first_seen,
            first_seen,
        ],
        schema=SCHEMA,
    )


def _write_part(
    path: Path, behaviors: pa.Table, vectors: NDArray[np.float32], fingerprint: str
) -> None:
    first_seen = behaviors["first_seen"].cast(TIME)
    table = embedding_rows(behaviors["behavior_id"], vectors, fingerprint, first_seen)
    with complete_file(path) as part:
        # Vectors do not compress: a dictionary of floats would only cost time.
        pq.write_table(table, part, compression="zstd", use_dictionary=["encoder_fingerprint"])
