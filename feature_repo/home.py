"""The home folder: where every table, feature file and artifact of one data set lies.

Nothing else in the project spells a path inside it. Files appear under their final name only when
they are complete: they are written beside it as ``.part`` and renamed.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from feature_repo.errors import LongtrailError

PROJECT_ROOT = Path(__file__).resolve().parent.parent
DEFAULT_HOME = PROJECT_ROOT / "var"
HOME_VARIABLE = "LONGTRAIL_HOME"


@dataclass(frozen=True)
class Home:
    """Paths below one home folder.

    Args:
        root: The folder; made absolute. It need not exist yet.
    """

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root).expanduser().resolve())

    @classmethod
    def from_environment(cls) -> "Home":
        """The folder of ``LONGTRAIL_HOME``, else ``var/`` in the project's root."""
        return cls(Path(os.environ.get(HOME_VARIABLE) or DEFAULT_HOME))

    # Written by ingest.
    @property
    def manifest(self) -> Path:
        """What the last ingest wrote (:class:`feature_repo.manifest.DataManifest`)."""
        return self.root / "tables" / "manifest.json"

    @property
    def tables(self) -> Path:
        """Folder of the canonical tables; replaced as a whole by ingest."""
        return self.root / "tables"

    @property
    def events(self) -> Path:
        """Folder of ``part-<bucket>.parquet``: events of the users of one hash bucket, sorted."""
        return self.root / "tables" / "events"

    @property
    def items(self) -> Path:
        """Versions of every item."""
        return self.root / "tables" / "items.parquet"

    @property
    def impressions(self) -> Path:
        """Labelled requests."""
        return self.root / "tables" / "impressions.parquet"

    @property
    def behaviors(self) -> Path:
        """Every distinct normalised text with its id."""
        return self.root / "tables" / "behaviors.parquet"

    @property
    def rejected(self) -> Path:
        """Rows that ingest set aside, with the reason."""
        return self.root / "tables" / "rejected.parquet"

    # Feature files: the offline store of the embedded profile.
    @property
    def features(self) -> Path:
        """Folder with one folder of parquet files per feature view."""
        return self.root / "features"

    def view(self, name: str) -> Path:
        """Folder of the parquet files of the feature view ``name``."""
        return self.features / name

    @property
    def embeddings(self) -> Path:
        """Folder with one folder per encoder fingerprint: vectors and their memory-mapped form."""
        return self.features / "behavior_embeddings"

    @property
    def encoder(self) -> Path:
        """Which encoder's vectors are current (:class:`feature_repo.manifest.EncoderManifest`)."""
        return self.root / "encoder.json"

    # Stores and artifacts.
    @property
    def registry(self) -> Path:
        """Feast's registry of the embedded profile."""
        return self.root / "registry.db"

    @property
    def online_store(self) -> Path:
        """Feast's online store of the embedded profile."""
        return self.root / "online_store.db"

    @property
    def runs(self) -> Path:
        """Folder with one artifact folder per training run."""
        return self.root / "runs"

    @property
    def current_run(self) -> Path:
        """Names the run that is served (:class:`feature_repo.artifact.CurrentRun`)."""
        return self.root / "runs" / "current.json"

    def materialized(self, profile: str) -> Path:
        """What was copied online (:class:`feature_repo.materialize.Materialized`)."""
        return self.root / f"materialized-{profile}.json"

    # The domain language model.
    @property
    def corpus(self) -> Path:
        """Folder of the documents that language models learn from."""
        return self.root / "lm" / "corpus"

    @property
    def tokenizers(self) -> Path:
        """Folder with one folder per tokenizer."""
        return self.root / "lm" / "tokenizers"

    @property
    def shards(self) -> Path:
        """Folder with one folder of tokenised documents per corpus and tokenizer."""
        return self.root / "lm" / "shards"

    @property
    def models(self) -> Path:
        """Folder with one model folder per language model that was made here."""
        return self.root / "lm" / "models"

    @property
    def evaluations(self) -> Path:
        """Folder of what was measured of language models."""
        return self.root / "lm" / "evaluations"

    # Written by live events.
    @property
    def live_events(self) -> Path:
        """Journal of live events of the embedded profile (:mod:`feature_repo.live_events`)."""
        return self.root / "live_events.db"

    @property
    def live_texts(self) -> Path:
        """Texts that live events brought (:class:`feature_repo.text_log.TextLog`)."""
        return self.root / "live_texts.jsonl"

    @property
    def live_clock(self) -> Path:
        """Time of the newest live event (:class:`feature_repo.manifest.LiveClock`)."""
        return self.root / "live_clock.json"

    @property
    def parity_runs(self) -> Path:
        """One line per comparison (:class:`feature_repo.parity_series.ParityRun`), newest last."""
        return self.root / "parity.jsonl"

    @property
    def served(self) -> Path:
        """Folder of the log of served requests (:mod:`feature_repo.served_files`), one per day."""
        return self.root / "served"

    @property
    def metrics(self) -> Path:
        """Folder of Prometheus text files, as node_exporter's textfile collector reads them."""
        return self.root / "metrics"

    @contextmanager
    def lock(self, what: str) -> Iterator[None]:
        """Hold the only right to write ``what``.

        Raises:
            LongtrailError: If another process holds it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.root / f".{what}.lock"
        try:
            with FileLock(path, timeout=0):
                yield
        except Timeout as error:
            raise LongtrailError(
                f"another process is writing {what} in {self.root}; wait for it to end, then run "
                "this again"
            ) from error


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """A ``.part`` path to write to, renamed to ``path`` if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """A ``.part`` folder to fill, put in place of ``path`` if the block ends without an error."""
    part, old = _beside(path)
    tidy_folder(path)
    part.mkdir(parents=True)
    try:
        yield part
        if path.exists():
            path.replace(old)
        part.replace(path)
    finally:
        tidy_folder(path)


def tidy_folder(path: Path) -> None:
    """Clear away what a killed :func:`complete_folder` left; the old folder where it was moved."""
    part, old = _beside(path)
    if old.exists() and not path.exists():  # killed between the two renames
        old.replace(path)
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)


def _beside(path: Path) -> tuple[Path, Path]:
    """Where a new folder is filled, and where the old one is moved."""
    return path.with_name(path.name + ".part"), path.with_name(path.name + ".old.part")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON; the file is either the old or the new one, never a part."""
    with complete_file(path) as part:
        part.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
