"""What an example of a task is, which are held out, and how many are drawn.

An example is an instruction on a record, and an answer, in the special tokens of
:mod:`encoders.lm.records`::

    <|instruction|>title<|listing|><|field:price|>2.55<|answer|>white hanging heart<|end|>
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from encoders.lm.corpus import SPLITS, Split
from encoders.lm.records import ANSWER, INSTRUCTION
from feature_repo.behavior import hash63
from feature_repo.errors import EncoderError

Clean = Callable[[str], str]
"""Makes a text of the tables one of a record: :func:`encoders.lm.records.plain`, or more."""


@dataclass(frozen=True)
class TaskConfig:
    """How many examples are made, and what they show.

    Raises:
        EncoderError: If a value is outside its range.
    """

    test_share: float = 0.1
    """Of the items known before the validation period; in [0, 1)."""
    valid_share: float = 0.05
    """Of the same items; in [0, 1)."""
    max_train: int = 5000
    """Examples per task on items, drawn by hash."""
    max_train_baskets: int = 2000
    """Examples of next baskets: one costs as much as five titles."""
    max_valid: int = 200
    """Examples per task."""
    max_test: int = 300
    num_neighbors: int = 3
    """Texts that an item is bought with, shown for its title."""
    history_lines: int = 20
    """Newest lines of a user's history that are shown."""
    user_baskets: int = 5
    """Baskets per user and split, drawn by hash, so that few large users are not all there is."""
    query_words: int = 2
    """Words of a query where the data set has no log of searches."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        for name in ("test_share", "valid_share"):
            if not 0 <= getattr(self, name) < 1:
                raise EncoderError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 < self.test_share + self.valid_share < 1:
            raise EncoderError(
                "test_share and valid_share must leave items to learn from, got "
                f"{self.test_share} + {self.valid_share}"
            )
        least_one = ("max_train", "max_train_baskets", "max_test", "history_lines")
        for name in (*least_one, "user_baskets", "query_words"):
            if getattr(self, name) < 1:
                raise EncoderError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_valid", "num_neighbors", "seed"):
            if getattr(self, name) < 0:
                raise EncoderError(f"{name} must be at least 0, got {getattr(self, name)}")

    def limit(self, split: Split) -> int:
        """Most examples of a task on items in a split."""
        return {"train": self.max_train, "valid": self.max_valid, "test": self.max_test}[split]

    def split_of(self, title: str) -> Split:
        """The split of an item that was known before the validation period.

        By its title, for two items of one title must not stand on both sides.
        """
        place = hash63(f"{self.seed}:split:{title}") % 10_000 / 10_000
        if place < self.test_share:
            return "test"
        return "valid" if place < self.test_share + self.valid_share else "train"


@dataclass(frozen=True)
class Example:
    """One instruction with its right answers."""

    task: str
    split: Split
    key: str
    """Item or user: examples of one hang together."""
    instruction: str
    """In words: what is asked."""
    record: str
    """What it is asked of, in the tokens of records."""
    answers: tuple[str, ...]
    """Right ones, at least one; the first is learned."""
    rules: Mapping[str, str]
    """Simple rule -> what it answers: what a model has to beat."""
    is_new: bool = False
    """Of an item first seen from the validation period on: pretraining has not seen it either."""

    @property
    def prompt(self) -> str:
        """Up to and including the token that begins the answer."""
        return f"{INSTRUCTION}{self.instruction}{self.record}{ANSWER}"


def draw(examples: Iterable[Example], config: TaskConfig) -> list[Example]:
    """At most so many examples per task and split, by hash; new items are drawn like others."""
    kept: list[Example] = []
    taken: Counter[tuple[str, Split]] = Counter()
    ranked = sorted(
        examples, key=lambda example: hash63(f"{config.seed}:{example.key}:{example.prompt}")
    )
    for example in ranked:
        place = (example.task, example.split)
        if taken[place] < config.limit(example.split):
            taken[place] += 1
            kept.append(example)
    return sorted(kept, key=lambda example: (example.task, SPLITS.index(example.split)))


def examples_fingerprint(examples: Sequence[Example]) -> str:
    """Hash of examples: the same ones were learned from, or measured on."""
    content = json.dumps([asdict(example) for example in examples], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
