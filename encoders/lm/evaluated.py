"""What is measured of one model, or of the n-gram baseline: kept, and not measured again."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from encoders.lm.documents import text_bytes, tokenize_documents
from encoders.lm.examples import Example
from encoders.lm.fertility import Fertility, measure
from encoders.lm.generation import GenerationOptions, generate_after
from encoders.lm.held_out_documents import HeldOut
from encoders.lm.instruction_rows import prompt_tokens
from encoders.lm.likelihood import measure_likelihood
from encoders.lm.ngram import NgramModel
from encoders.lm.task_scores import TaskScore, score_tasks
from feature_repo.home import Home
from feature_repo.manifest import Document
from feature_repo.progress import ProgressBars

ANSWER_TOKENS = 32
"""Written at most of an answer; titles are shorter."""
_MEASURES = 1
"""Raised where figures get another meaning: what was measured before no longer counts."""
_SHOWN = 3
"""Answers per task that are kept to be looked at."""


class SourceBits(Document):
    """Bits that the documents of one source need; one entry per document."""

    bits: list[float]
    num_bytes: list[int]


class Answer(Document):
    """One answer, to be looked at."""

    task: str
    prompt: str
    right: str
    answer: str


class Measured(Document):
    """What was measured of one model."""

    sources: dict[str, SourceBits]
    fertility: dict[str, Fertility]
    tasks: dict[str, TaskScore]
    answers: list[Answer]


def kept(home: Home, identity: Any) -> tuple[Any, Measured | None]:
    """Where a measurement lies, and what is there.

    Args:
        home: Whose.
        identity: All that decides the figures, JSON values.
    """
    canonical = json.dumps([_MEASURES, identity], sort_keys=True).encode()
    path = home.evaluations / "parts" / f"{hashlib.sha256(canonical).hexdigest()[:16]}.json"
    if not path.exists():
        return path, None
    return path, Measured.load(path, made_by="longtrail lm evaluate")


def measure_model(
    model: Any,
    tokenizer: Any,
    held_out: Mapping[str, HeldOut],
    examples: Sequence[Example],
    *,
    name: str,
    bars: ProgressBars,
) -> Measured:
    """Bits of held-out text, tokens of it, and answers to the tasks.

    Args:
        model: With a head over the vocabulary.
        tokenizer: Its own.
        held_out: Source -> documents.
        examples: Of any tasks; may be empty.
        name: For the bars.
        bars: Opens them.
    """
    sources = {}
    for source, documents in held_out.items():
        with bars(f"{name}: {source}") as progress:
            found = measure_likelihood(model, tokenizer, documents.texts, progress=progress)
        sources[source] = SourceBits(bits=found.bits.tolist(), num_bytes=found.num_bytes.tolist())
    answers: list[str] = []
    if examples:
        longest = int(model.config.max_position_embeddings) - ANSWER_TOKENS - 1
        prompts = prompt_tokens(tokenizer, examples, longest=longest)
        with bars(f"{name}: tasks") as progress:
            options = GenerationOptions(max_tokens=ANSWER_TOKENS)
            answers = generate_after(model, tokenizer, prompts, options, progress=progress)
    return Measured(
        sources=sources,
        fertility={
            source: measure(tokenizer, documents.texts) for source, documents in held_out.items()
        },
        tasks=score_tasks(examples, answers),
        answers=_shown(examples, answers),
    )


def measure_ngram(
    tokenizer: Any,
    learned: Sequence[str],
    held_out: Mapping[str, HeldOut],
    *,
    order: int,
    bars: ProgressBars,
) -> Measured:
    """Bits of held-out text by an n-gram model over a tokenizer's tokens.

    Args:
        tokenizer: Any with an end token.
        learned: Documents to count.
        held_out: Source -> documents.
        order: n.
        bars: Opens a bar.
    """
    with bars(f"{order}-gram") as progress:
        total = 1 + len(held_out)
        model = NgramModel(tokenize_documents(tokenizer, learned), len(tokenizer), order=order)
        progress(1, total)
        sources = {}
        for source, documents in held_out.items():
            found = model.log2_probabilities(tokenize_documents(tokenizer, documents.texts))
            sources[source] = SourceBits(
                bits=[-float(np.sum(row)) for row in found],
                num_bytes=text_bytes(documents.texts).tolist(),
            )
            progress(1, total)
    return Measured(sources=sources, fertility={}, tasks={}, answers=[])


def _shown(examples: Sequence[Example], answers: Sequence[str]) -> list[Answer]:
    """The first answers of every task."""
    kept_answers: list[Answer] = []
    for task in dict.fromkeys(example.task for example in examples):
        pairs = [p for p in zip(examples, answers, strict=True) if p[0].task == task]
        kept_answers += [
            Answer(task=task, prompt=example.prompt, right=example.answers[0], answer=answer)
            for example, answer in pairs[:_SHOWN]
        ]
    return kept_answers
