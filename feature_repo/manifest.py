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
            place = ".".join(str(p) for p in first["loc"])
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
    """Hash of the data set file and of the identity of every file that it reads."""

    def now(self) -> datetime:
        """The moment at which an online request is answered, UTC.

        For a replayed data set this is the first moment at which everything in it can be read.
        """
        if self.replay:
            return self.last_event + timedelta(microseconds=self.availability_delay_us)
        return datetime.now(UTC)


def load_manifest(home: Home) -> DataManifest:
    """The manifest of the last ingest into ``home``."""
    return DataManifest.load(home.manifest, made_by="longtrail ingest")


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
