"""What the steps tell each other through the home folder: checked documents, no code.

:class:`DataManifest` is written by ingest and read by every later step and by ``repo.py``;
:class:`EncoderManifest` is written by encode.
"""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from feature_repo.errors import MissingStepError, StoreError
from feature_repo.home import Home, write_json

SEQUENCE_LENGTH = 100
"""Default of N, the behaviours kept per scene in a sequence row."""


class Document(BaseModel):
    """A JSON file in the home folder or in an artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def save(self, path: Path) -> None:
        """Write the document; never a half one."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path, *, made_by: str) -> Self:
        """Read the document.

        Raises:
            MissingStepError: If the file does not exist; ``made_by`` is the command to run first.
            StoreError: If it is not of this form.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise MissingStepError(f"{path} does not exist yet: run `{made_by}` first") from error
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(p) for p in first["loc"]) or "document"
            raise StoreError(
                f"{path} is not a file this version reads ({place}: {first['msg']}): "
                f"run `{made_by}` again"
            ) from error


class ItemColumn(Document):
    """A column of the data set's own on items."""

    name: str
    kind: Literal["numeric", "categorical"]


class Split(Document):
    """Time split: train is ``[train, valid)``, valid is ``[valid, test)``, test is the rest."""

    train: AwareDatetime | None = None
    valid: AwareDatetime
    test: AwareDatetime


class DataManifest(Document):
    """The canonical tables of one data set."""

    dataset: str
    scenes: tuple[str, ...]
    """In alphabetical order; the order of every per-scene array."""
    item_columns: tuple[ItemColumn, ...]
    context_columns: tuple[str, ...]
    """Numeric columns of impressions that are known at request time."""
    impressions: Literal["logged", "sampled", "none"]
    """``sampled``: negatives were drawn, so past impressions and clicks are no features."""
    negatives: str | None
    """In words, how the negatives came about; None for logged impressions."""
    split: Split
    replay: bool
    """The data is historical: "now" is the last event's time, not the wall clock."""
    lowercase: bool
    availability_delay_us: int
    """Microseconds from an event to the moment its features can be read; at least 1."""
    label_delay_us: int
    """Microseconds from an impression to the moment its click is known."""
    num_events: int
    num_users: int
    num_items: int
    num_behaviors: int
    num_impressions: int
    num_rejected: int
    first_event: AwareDatetime
    last_event: AwareDatetime
    sequence_length: int = SEQUENCE_LENGTH
    """N, behaviours kept per scene in a row of ``user_sequences``."""
    num_buckets: int
    """Files in the folder of events; a user's bucket is hash63(user_id) % num_buckets."""
    source_fingerprint: str
    """Hash of the data set file and of the bytes of every file that it reads."""
    max_text_length: int = 1000
    """Characters; longer texts are no behaviours."""
    live_sequence: int = 0
    """Number of the last live event that the tables hold; 0 where they hold none."""
    newest_live: AwareDatetime | None = None
    """Time of the newest live event, of :func:`load_manifest`; never in the file."""

    def now(self) -> datetime:
        """The moment at which an online request is answered, UTC.

        For a replayed data set this is the first moment at which everything in it can be read,
        live events included: its clock stands still until an event moves it.
        """
        if self.replay:
            newest = max(self.last_event, self.newest_live or self.last_event)
            return newest + timedelta(microseconds=self.availability_delay_us)
        return datetime.now(UTC)


class LiveClock(Document):
    """The clock of a replayed data set, as far as live events moved it."""

    newest_event: AwareDatetime


def load_manifest(home: Home) -> DataManifest:
    """The manifest of the last ingest into ``home``, with the clock that live events moved."""
    manifest = DataManifest.load(home.manifest, made_by="longtrail ingest")
    if manifest.replay and home.live_clock.exists():
        clock = LiveClock.load(home.live_clock, made_by="longtrail serve")
        return manifest.model_copy(update={"newest_live": clock.newest_event})
    return manifest


class DataClock:
    """The data set's "now", as :func:`load_manifest` would tell it, at the cost of two ``stat``.

    Another process's live events move the clock of a replayed data set; the wall clock needs no
    file. For servers that ask with every request.

    Args:
        home: Whose.
    """

    def __init__(self, home: Home) -> None:
        self._files = (home.manifest, home.live_clock)
        self._home = home
        self._state: tuple[list[int], DataManifest] | None = None

    def __call__(self) -> datetime:
        """Now, UTC.

        Raises:
            MissingStepError: If nothing was ingested.
        """
        stamps = [_changed(path) for path in self._files]
        if self._state is None or self._state[0] != stamps:
            try:
                self._state = (stamps, load_manifest(self._home))
            except MissingStepError:  # an ingest is just replacing the tables
                if self._state is None:
                    raise
        return self._state[1].now()


def _changed(path: Path) -> int:
    """When a file last changed, in ns; 0 where there is none, or it is just being replaced."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


class EncoderManifest(Document):
    """An encoder: beside its vectors, and once more in the home for the current one."""

    model: str
    """Hub name or folder."""
    model_fingerprint: str
    """Hash of the weights' and the tokenizer's identity."""
    split_layer: int
    """k: the layers 1..k are the shallow half."""
    pooling: Literal["mean", "last", "first"]
    prompt: str
    """Template with ``{text}``."""
    normalize: bool
    """Vectors have unit length."""
    dtype: Literal["float32", "bfloat16"]
    """Arithmetic of the encoder; vectors are always stored as float32."""
    max_tokens: int
    width: int
    """D, length of a vector."""
    fingerprint: str
    """Hash of everything above: two tables with the same fingerprint hold the same vectors."""


def load_encoder(home: Home) -> EncoderManifest:
    """The encoder of the current embedding table of ``home``."""
    return EncoderManifest.load(home.encoder, made_by="longtrail encode")
