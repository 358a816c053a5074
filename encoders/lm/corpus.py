"""The corpus: documents by split and source, which tokenizers and models learn from.

``home.corpus`` holds ``manifest.json`` (:class:`CorpusManifest`) and
``<split>/<source>.parquet`` with the columns of :data:`DOCUMENT_SCHEMA`. It is made by
:mod:`encoders.lm.corpus_builder`; this module reads it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AwareDatetime, Field

from feature_repo.errors import DataSetError, MissingStepError
from feature_repo.home import Home
from feature_repo.manifest import DataManifest, Document

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
SourceKind = Literal["domain", "general"]

COMMAND = "longtrail lm corpus"
DOCUMENT_SCHEMA = pa.schema(
    [
        pa.field("document_id", pa.int64(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("time", pa.timestamp("us", tz="UTC")),
    ]
)
"""document_id: :func:`feature_repo.behavior.hash63` of the text. text: without the end token.
time: of the last thing in it; null where the source has no times."""
_BATCH_DOCUMENTS = 8192
_DRAWN_FROM = 1 << 20
"""Steps in which a share of the documents is drawn: a millionth."""


class MixtureConfig(Document):
    """How to weigh the sources of a corpus; see :func:`encoders.lm.mixture.mixture`."""

    general_share: float | None = Field(default=None, ge=0, le=1)
    """Share of all general sources together; None: as their bytes say (learning from scratch)."""
    temperature: float = Field(default=2.0, gt=0)
    """T: a source of b bytes counts b ** (1 / T); above 1, small sources come more often. In
    proportion, what a shop has least of and asks for most, its listings, would hardly be read."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Source -> factor on how often it comes; 1 where not named, 0 leaves it out."""


class SplitSize(Document):
    """What one split of a source holds."""

    documents: int = 0
    bytes: int = 0
    """UTF-8, without end tokens."""


class SourceSummary(Document):
    """One source of the corpus."""

    kind: SourceKind
    origin: str
    """Where it is from, in words."""
    fingerprint: str
    """Of the data and the settings that decide its documents."""
    splits: dict[Split, SplitSize]
    dropped: dict[str, int]
    """Reason -> documents left out."""
    languages: dict[str, int]
    """ISO 639-1 code -> documents kept; ``und`` where the text is too short. Free text only."""
    scrubbed: dict[str, int]
    """Kind of personal data -> places where it was replaced in documents kept."""

    @property
    def train_bytes(self) -> int:
        """UTF-8 bytes of the training split."""
        return self.splits["train"].bytes


class CorpusManifest(Document):
    """What a corpus was made from, and how much of what is in it."""

    format: Literal[1] = 1
    created: AwareDatetime
    fingerprint: str
    """Of all sources: two corpora with the same one hold the same documents."""
    dataset: str
    until: AwareDatetime
    """The training cut: documents of this time and later are not in the training split."""
    sources: dict[str, SourceSummary]
    special_tokens: tuple[str, ...]
    """Those of records, which a tokenizer must hold as single tokens."""
    mixture: MixtureConfig
    """As given; not part of the fingerprint."""
    options: dict[str, Any]
    """:class:`encoders.lm.corpus_builder.CorpusConfig` as given."""
    tables: str | None = None
    """Source fingerprint of the tables whose records are in it; None where it has only files."""

    @property
    def is_scrubbed(self) -> bool:
        """Whether personal data was replaced in it."""
        return bool(self.options.get("filters", {}).get("scrub", False))

    def source(self, name: str) -> SourceSummary:
        """One source of the corpus.

        Raises:
            DataSetError: If it has no such source.
        """
        if name not in self.sources:
            raise DataSetError(
                f"the corpus has no source {name!r}: it has {', '.join(self.sources)}; name one of "
                f"these, or add it with `{COMMAND} --source`"
            )
        return self.sources[name]


def load_corpus(home: Home) -> CorpusManifest:
    """The manifest of the home's corpus, where it is one of the home's tables.

    Raises:
        MissingStepError: If none was built, or other tables were ingested since; where there are
            no tables any more, it stands for itself.
        StoreError: If it is of another version.
    """
    corpus = stored_corpus(home)
    if corpus.tables is not None and home.manifest.exists():
        tables = DataManifest.load(home.manifest, made_by="longtrail ingest").source_fingerprint
        if tables != corpus.tables:
            raise MissingStepError(
                "the corpus was made of other tables than those that are there now: run "
                f"`{COMMAND}` again, with the same options"
            )
    return corpus


def stored_corpus(home: Home) -> CorpusManifest:
    """The manifest of the home's corpus, of whatever tables it was made.

    Raises:
        MissingStepError: If none was built.
        StoreError: If it is of another version.
    """
    return CorpusManifest.load(manifest_path(home), made_by=COMMAND)


def manifest_path(home: Home) -> Path:
    """Where the corpus' manifest lies."""
    return home.corpus / "manifest.json"


def read_documents(home: Home, split: Split, source: str) -> pa.Table:
    """All documents of one source and split, with the columns of :data:`DOCUMENT_SCHEMA`.

    Raises:
        MissingStepError: If no corpus was built.
        DataSetError: If it has no such source.
    """
    return pa.Table.from_batches(document_batches(home, split, source), schema=DOCUMENT_SCHEMA)


def document_batches(home: Home, split: Split, source: str) -> Iterator[pa.RecordBatch]:
    """:func:`read_documents` in parts, for what may not fit into memory.

    Raises:
        MissingStepError: If no corpus was built.
        DataSetError: If it has no such source.
    """
    path = home.corpus / split / f"{source}.parquet"
    if not path.exists():
        load_corpus(home).source(source)
        raise MissingStepError(f"{path} is missing: run `{COMMAND}` again")
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(_BATCH_DOCUMENTS)


def sample_texts(home: Home, split: Split, source: str, max_bytes: int) -> Iterator[str]:
    """The texts of a source, or of a large one about ``max_bytes``, drawn by the documents' ids.

    Raises:
        MissingStepError: If no corpus was built.
        DataSetError: If it has no such source.
    """
    size = load_corpus(home).source(source).splits[split].bytes
    limit = min(1.0, max_bytes / max(1, size)) * _DRAWN_FROM
    for batch in document_batches(home, split, source):
        ids, texts = batch["document_id"].to_pylist(), batch["text"].to_pylist()
        for key, text in zip(ids, texts, strict=True):
            if key % _DRAWN_FROM < limit:
                yield text
