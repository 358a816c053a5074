"""What an evaluation of language models says: a document in the home folder."""

from typing import Any, Literal

from pydantic import AwareDatetime

from encoders.lm.corpus import Split
from encoders.lm.evaluated import Answer
from encoders.lm.fertility import Fertility
from encoders.lm.task_scores import TaskScore
from feature_repo.manifest import Document


class BitsPerByte(Document):
    """Bits per byte of some documents; lower is better."""

    value: float
    low: float | None
    """Of the 95 % interval: documents drawn with replacement."""
    high: float | None
    difference: float
    """Less that of the first model on the same documents; below 0 = better."""
    difference_low: float | None
    difference_high: float | None
    num_documents: int
    num_bytes: int


class SpeedFigures(Document):
    """Writing the same text token by token; see :mod:`encoders.lm.generation_speed`."""

    characters_per_s: float
    tokens_per_s: float
    characters_per_token: float
    seconds: list[float]
    """Of each round."""


class ModelFigures(Document):
    """One model's column of the table."""

    name: str
    folder: str | None
    """None for the n-gram baseline."""
    fingerprint: str | None
    num_parameters: int | None
    vocab_size: int
    bits_per_byte: dict[str, BitsPerByte]
    """Source, and ``domain`` and ``general`` for all of a kind together."""
    fertility: dict[str, Fertility]
    """Source -> tokens of its held-out documents."""
    tasks: dict[str, TaskScore]
    answers: list[Answer]
    """The first of every task."""
    speed: SpeedFigures | None


class Evaluation(Document):
    """Models side by side."""

    format: Literal[1] = 1
    created: AwareDatetime
    dataset: str
    corpus: str
    """Fingerprint of the corpus."""
    split: Split
    until: AwareDatetime
    """Nothing of this moment or later was to be learned from."""
    examples: str | None
    """Fingerprint of the tasks' examples; None where there are none."""
    config: dict[str, Any]
    git_revision: str | None
    models: list[ModelFigures]
    """In the order asked for; the n-gram baseline is the last."""
