"""Writes the documents of one source by split, as they come; memory is bounded by a batch."""

from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from encoders.lm.corpus import DOCUMENT_SCHEMA, SPLITS, SourceSummary, Split, SplitSize
from encoders.lm.duplicates import DuplicateFilter
from encoders.lm.filters import DocumentFilter, FilterConfig
from encoders.lm.sources import RawDocument, Source, split_at
from feature_repo.behavior import hash63
from feature_repo.manifest import Split as SplitTimes
from feature_repo.progress import Progress

_BATCH_DOCUMENTS = 4096
_UNTIMED_PARTS = 50
"""By a hash of the text, documents without time are 96 % train, 2 % valid, 2 % test."""


def write_source(
    folder: Path,
    source: Source,
    fingerprint: str,
    config: FilterConfig,
    times: SplitTimes,
    duplicates: DuplicateFilter | None,
    progress: Progress,
) -> SourceSummary:
    """Write ``<split>.parquet`` for every split, also for those without documents.

    Args:
        folder: Exists.
        source: Is read once.
        fingerprint: Of the source.
        config: What is left out.
        times: Where the splits begin.
        duplicates: Of :class:`encoders.lm.filters.DocumentFilter`.
        progress: Told documents read, with a total of 0: it is not known.
    """
    keep = DocumentFilter(source, config, duplicates)
    documents, sizes = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    stream = source.read()
    with ExitStack() as files:
        writers = {
            split: files.enter_context(
                pq.ParquetWriter(folder / f"{split}.parquet", DOCUMENT_SCHEMA, compression="zstd")
            )
            for split in SPLITS
        }
        while batch := list(islice(stream, _BATCH_DOCUMENTS)):
            rows: dict[Split, list[RawDocument]] = {split: [] for split in SPLITS}
            for document in batch:
                for text, time in keep(document):
                    rows[_split(text, time, times)].append((text, time))
            for split, kept in rows.items():
                if kept:
                    writers[split].write_table(_table(kept))
                documents[split] += len(kept)
                sizes[split] += sum(len(text.encode()) for text, _ in kept)
            progress(len(batch), 0)
    return SourceSummary(
        kind=source.kind,
        origin=source.origin,
        fingerprint=fingerprint,
        splits={
            split: SplitSize(documents=documents[split], bytes=sizes[split]) for split in SPLITS
        },
        dropped=dict(keep.dropped),
        languages=dict(keep.languages.most_common()),
        scrubbed=dict(keep.scrubbed),
    )


def written_texts(folder: Path) -> Iterator[str]:
    """The texts of a source that :func:`write_source` wrote, split by split."""
    for split in SPLITS:
        with pq.ParquetFile(folder / f"{split}.parquet") as file:
            for batch in file.iter_batches(_BATCH_DOCUMENTS, columns=["text"]):
                yield from batch["text"].to_pylist()


def _split(text: str, time: datetime | None, times: SplitTimes) -> Split:
    if time is not None:
        return split_at(time, times)
    part = hash63(text) % _UNTIMED_PARTS
    return "valid" if part == 0 else "test" if part == 1 else "train"


def _table(documents: list[RawDocument]) -> pa.Table:
    columns = {
        "document_id": [hash63(text) for text, _ in documents],
        "text": [text for text, _ in documents],
        "time": [time for _, time in documents],
    }
    return pa.table(columns, schema=DOCUMENT_SCHEMA)
