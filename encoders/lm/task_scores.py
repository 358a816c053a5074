"""How many answers are right: exactly, and word by word; beside what simple rules answer."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from encoders.lm.examples import Example
from encoders.lm.intervals import ratio_interval
from feature_repo.manifest import Document


class Score(Document):
    """Answers to the examples of one task."""

    num: int
    exact: float
    """Share of the answers that are one of the right ones, white space at the ends aside."""
    low: float | None
    """Of the 95 % interval of ``exact``: items or users drawn with replacement."""
    high: float | None
    word_f1: float
    """Harmonic mean of the shares of words told and of words right, against the nearest right
    answer; the mean over the examples."""


class TaskScore(Document):
    """A model on one task."""

    model: Score
    new: Score | None
    """On items that not even pretraining has seen; None where there are none."""
    rules: dict[str, Score]
    """Simple rule -> how it does on the same examples."""


def score(examples: Sequence[Example], answers: Sequence[str]) -> Score:
    """Compare answers with the right ones.

    Args:
        examples: N, at least one.
        answers: N.
    """
    right = np.array(
        [a.strip() in example.answers for example, a in zip(examples, answers, strict=True)]
    )
    low, high = ratio_interval(
        right, np.ones(len(right)), groups=[example.key for example in examples]
    ) or (None, None)
    overlap = [
        max(word_f1(answer, told) for told in example.answers)
        for example, answer in zip(examples, answers, strict=True)
    ]
    return Score(
        num=len(examples),
        exact=float(right.mean()),
        low=low,
        high=high,
        word_f1=float(np.mean(overlap)),
    )


def score_tasks(examples: Sequence[Example], answers: Sequence[str]) -> dict[str, TaskScore]:
    """:func:`score` of every task, of its new items, and of its rules; by task.

    Args:
        examples: N, of any tasks.
        answers: N.
    """
    found = {}
    for task in sorted({example.task for example in examples}):
        pairs = [p for p in zip(examples, answers, strict=True) if p[0].task == task]
        of_task = [example for example, _ in pairs]
        new = [pair for pair in pairs if pair[0].is_new]
        found[task] = TaskScore(
            model=score(of_task, [answer for _, answer in pairs]),
            new=score([e for e, _ in new], [answer for _, answer in new]) if new else None,
            rules={
                rule: score(of_task, [example.rules[rule] for example in of_task])
                for rule in of_task[0].rules
            },
        )
    return found


def word_f1(answer: str, right: str) -> float:
    """Harmonic mean of precision and recall of words, counted as often as they come; in [0, 1].

    Source:
        Rajpurkar et al., "SQuAD", EMNLP 2016, section 6.1; articles and punctuation are kept here.
    """
    told, wanted = Counter(answer.split()), Counter(right.split())
    shared = (told & wanted).total()
    if not shared:
        return float(told == wanted)
    return 2 * shared / (told.total() + wanted.total())
