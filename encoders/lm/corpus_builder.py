"""Step ``lm corpus``: documents from the tables and from files, filtered, split by time.

Each source is finished for itself in ``<corpus>.building.part/<source>/``: a build that was killed
keeps those that are complete, and a later build keeps those that its settings leave as they are.
Free text leaves out what the free text of the sources before it says, so it depends on these too.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from encoders.lm.built_in_sources import BUILT_IN
from encoders.lm.corpus import (
    COMMAND,
    SPLITS,
    CorpusManifest,
    MixtureConfig,
    SourceSummary,
    Split,
    manifest_path,
    stored_corpus,
)
from encoders.lm.duplicates import DuplicateFilter
from encoders.lm.filters import FilterConfig
from encoders.lm.mixture import check_weights, mixture
from encoders.lm.records import special_tokens
from encoders.lm.source_writer import write_source, written_texts
from encoders.lm.sources import Source, table_sources
from encoders.lm.text_files import FileSource, file_source, python_docs
from feature_repo.errors import DataSetError, MissingStepError, StoreError
from feature_repo.home import Home, complete_folder
from feature_repo.manifest import DataManifest, load_manifest
from feature_repo.progress import Progress, silent

_SUMMARY = "summary.json"


@dataclass(frozen=True)
class CorpusConfig:
    """What a corpus is made from.

    Raises:
        DataSetError: If a value cannot be used.
    """

    sources: tuple[str, ...] = BUILT_IN
    """Built-in sources, of :data:`encoders.lm.built_in_sources.BUILT_IN`."""
    files: tuple[FileSource, ...] = ()
    """The user's own."""
    history_days: int = 91
    """Length of the periods that histories are cut into: a quarter of a year."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """Kept in the manifest, for whoever draws from the corpus."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.sources if name not in BUILT_IN]
        if unknown:
            raise DataSetError(
                f"there is no built-in source {unknown[0]!r}: choose of {', '.join(BUILT_IN)}, or "
                "name files of your own"
            )
        names = [*self.sources, *(source.name for source in self.files)]
        if not names:
            raise DataSetError("a corpus needs at least one source, got none")
        twice = [name for name, times in Counter(names).items() if times > 1]
        if twice:
            raise DataSetError(f"there are two sources {twice[0]!r}: give each a name of its own")
        check_weights(self.mixture, names)
        if self.history_days < 1:
            raise DataSetError(f"history_days must be at least 1, got {self.history_days}")


def build_corpus(home: Home, config: CorpusConfig, progress: Progress = silent) -> CorpusManifest:
    """Write the corpus into ``home.corpus``; nothing changes where it is there already.

    Args:
        home: Ingest has been run.
        config: From what.
        progress: Told documents read; how many there are is not known before (0).

    Raises:
        MissingStepError: If nothing has been ingested.
        DataSetError: If files are missing or cannot be read, one of the user's sources gives no
            document, or no source gives any from before the training cut.
        LongtrailError: If another process builds a corpus in this home.
    """
    data = load_manifest(home)
    sources = _chosen_sources(home, data, config)
    options = json.loads(json.dumps(asdict(config) | {"mixture": config.mixture.model_dump()}))
    has_records = any(source.is_record for source in sources)
    told: dict[str, Any] = {
        "dataset": data.dataset,
        "until": data.split.valid,
        "special_tokens": special_tokens(data),
        "mixture": config.mixture,
        "options": options,
        "tables": data.source_fingerprint if has_records else None,
    }
    decisive = {"filters": options["filters"], "split": data.split.model_dump(mode="json")}
    prints = _fingerprints(sources, decisive)
    with home.lock("corpus"):
        old = _there(home)
        before = {} if old is None else {n: s.fingerprint for n, s in old.sources.items()}
        if old is not None and before == prints and old == old.model_copy(update=told):
            return old
        building = home.corpus.with_name(home.corpus.name + ".building.part")
        seen = _SeenTexts(config.filters.near_duplicates)
        summaries = {}
        for source in sources:
            folder = building / source.name
            fingerprint = prints[source.name]
            summary = _finished(folder, fingerprint)
            if summary is None and old is not None and before.get(source.name) == fingerprint:
                summary = old.sources[source.name]
                _take_over(home.corpus, source.name, summary, folder)
            if summary is None:
                with complete_folder(folder) as part:
                    summary = write_source(
                        part,
                        source,
                        fingerprint,
                        config.filters,
                        data.split,
                        seen.before(source),
                        progress,
                    )
                    summary.save(part / _SUMMARY)
            else:
                seen.add(source, folder)
            summaries[source.name] = summary
        manifest = CorpusManifest(
            created=datetime.now(UTC),
            fingerprint=hashlib.sha256(json.dumps(prints).encode()).hexdigest()[:16],
            sources=summaries,
            **told,
        )
        _check(manifest, config)
        with complete_folder(home.corpus) as part:
            for name in summaries:
                # First, for a kill in between must leave no summary without its documents.
                (building / name / _SUMMARY).unlink()
                for split in SPLITS:
                    target = _documents(part, split, name)
                    target.parent.mkdir(exist_ok=True)
                    (building / name / f"{split}.parquet").replace(target)
            manifest.save(part / manifest_path(home).name)
        shutil.rmtree(building)
    return manifest


def _chosen_sources(home: Home, data: DataManifest, config: CorpusConfig) -> list[Source]:
    built_in = [*table_sources(home, data, history_days=config.history_days), python_docs()]
    chosen = [source for source in built_in if source.name in config.sources]
    return chosen + [file_source(files) for files in config.files]


def _fingerprints(sources: Sequence[Source], options: Mapping[str, Any]) -> dict[str, str]:
    """Source -> fingerprint, in which that of the free text before it is."""
    prints: dict[str, str] = {}
    before: str | None = None
    for source in sources:
        if source.is_record:
            prints[source.name] = source.fingerprint(options)
        else:
            after = {} if before is None else {"after": before}
            before = prints[source.name] = source.fingerprint({**options, **after})
    return prints


class _SeenTexts:
    """Which texts a source must not say again: its own, and those of free text before it.

    A copy in another source could be held out there and learned here.
    """

    def __init__(self, near: float | None) -> None:
        self._near = near
        self._free_text = DuplicateFilter(near)
        self._unread: list[Path] = []

    def add(self, source: Source, folder: Path) -> None:
        """A source that is finished, of which this run has read nothing."""
        if not source.is_record:
            self._unread.append(folder)

    def before(self, source: Source) -> DuplicateFilter | None:
        """What a source is to be written with."""
        if not source.deduplicate:
            return None
        if source.is_record:
            return DuplicateFilter(self._near)
        for folder in self._unread:
            for text in written_texts(folder):
                self._free_text.problem(text)
        self._unread.clear()
        return self._free_text


def _take_over(corpus: Path, name: str, summary: SourceSummary, folder: Path) -> None:
    """Copy a source that is as it was in the corpus before."""
    with complete_folder(folder) as part:
        for split in SPLITS:
            shutil.copyfile(_documents(corpus, split, name), part / f"{split}.parquet")
        summary.save(part / _SUMMARY)


def _documents(corpus: Path, split: Split, source: str) -> Path:
    return corpus / split / f"{source}.parquet"


def _there(home: Home) -> CorpusManifest | None:
    """The corpus that is there, if it is one of this version and complete."""
    try:
        manifest = stored_corpus(home)
    except (MissingStepError, StoreError):
        return None
    files = [_documents(home.corpus, split, name) for split in SPLITS for name in manifest.sources]
    return manifest if all(path.exists() for path in files) else None


def _finished(folder: Path, fingerprint: str) -> SourceSummary | None:
    """What an unfinished build has of a source, if it is what is asked for now."""
    try:
        summary = SourceSummary.load(folder / _SUMMARY, made_by=COMMAND)
    except (MissingStepError, StoreError):
        return None
    return summary if summary.fingerprint == fingerprint else None


def _check(manifest: CorpusManifest, config: CorpusConfig) -> None:
    for files in config.files:
        summary = manifest.sources[files.name]
        if not any(size.documents for size in summary.splits.values()):
            reasons = ", ".join(f"{n:,} {why}" for why, n in summary.dropped.items())
            raise DataSetError(
                f"source {files.name} gives no document ({reasons or 'its files are empty'}): "
                "expected texts of some length; change the files or the filter's options"
            )
    mixture(manifest)  # says so where there is nothing to learn from, or a weight of no source
