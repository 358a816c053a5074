"""Step ``lm evaluate``: any number of language models side by side, on text none has learned.

``home.evaluations`` holds ``evaluation.json`` (:class:`Evaluation`), the last one, and in ``parts``
what was measured of each model; that is not measured again, so an evaluation that was killed goes
on, and one more model costs one more model.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from encoders.fingerprint import model_fingerprint
from encoders.lm.corpus import CorpusManifest, Split, load_corpus
from encoders.lm.evaluated import Measured, kept, measure_model, measure_ngram
from encoders.lm.evaluation_documents import (
    BitsPerByte,
    Evaluation,
    ModelFigures,
    SpeedFigures,
)
from encoders.lm.examples import Example, TaskConfig, examples_fingerprint
from encoders.lm.fertility import token_ids
from encoders.lm.generation_speed import Speed, measure_speeds
from encoders.lm.held_out_documents import HeldOut, draw_documents, texts_to_write
from encoders.lm.intervals import ratio_interval
from encoders.lm.model_folder import load_language_model
from encoders.lm.ngram import DEFAULT_ORDER
from encoders.lm.shards import tokenizer_fingerprint
from encoders.lm.tasks import build_examples, choose
from feature_repo.errors import EncoderError
from feature_repo.home import Home
from feature_repo.progress import ProgressBars, no_bars
from feature_repo.revision import git_revision

EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured, and on how much.

    Raises:
        EncoderError: If a value is outside its range.
    """

    split: Split = "test"
    """Of the corpus and of the tasks."""
    document_bytes: int = 200_000
    """Of held-out text per source, in whole documents."""
    tasks: TaskConfig = field(default_factory=TaskConfig)
    with_tasks: bool = True
    ngram_order: int = DEFAULT_ORDER
    """Of the baseline; 0 = none."""
    ngram_bytes: int = 30_000_000
    """Of training text per source that the baseline counts; 100 MB in all take about 4 GB."""
    speed_rounds: int = 3
    """Times that every model writes the same text; 0 = speed is not measured."""
    speed_texts: int = 6
    speed_characters: int = 300
    """Of each text."""

    def __post_init__(self) -> None:
        for name in ("document_bytes", "ngram_bytes", "speed_texts", "speed_characters"):
            if getattr(self, name) < 1:
                raise EncoderError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("ngram_order", "speed_rounds"):
            if getattr(self, name) < 0:
                raise EncoderError(f"{name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class _Model:
    """A model that takes part."""

    name: str
    folder: Path
    fingerprint: str
    model: Any
    tokenizer: Any


def evaluate_models(
    home: Home,
    folders: Sequence[Path],
    config: EvaluationConfig = EvaluationConfig(),  # immutable
    *,
    device: torch.device = torch.device("cpu"),  # noqa: B008  # immutable
    bars: ProgressBars = no_bars,
) -> Evaluation:
    """Measure models on the same held-out text and tasks, and write :data:`EVALUATION_FILE`.

    Args:
        home: Whose corpus and tables.
        folders: Models, at least one; the first is what the others are compared with.
        config: What.
        device: Where it computes.
        bars: Opens a bar for each part.

    Raises:
        EncoderError: If a model cannot be loaded, or none is given.
        MissingStepError: If there is no corpus, or it is of other tables.
        DataSetError: If nothing is held out.
    """
    if not folders:
        raise EncoderError("an evaluation needs at least one model folder, got none")
    corpus = load_corpus(home)
    held_out = draw_documents(home, corpus, config.split, config.document_bytes)
    examples: list[Example] = []
    if config.with_tasks:
        examples = choose(build_examples(home, config.tasks), config.split)
    taking_part = _open(folders, device)
    measured = [
        _measured(home, one, corpus, held_out, examples, config, bars) for one in taking_part
    ]
    speeds = _speeds(taking_part, held_out, config, bars)
    kinds = {source: documents.kind for source, documents in held_out.items()}
    columns = [
        ModelFigures(
            name=one.name,
            folder=str(one.folder),
            fingerprint=one.fingerprint,
            num_parameters=sum(p.numel() for p in one.model.parameters()),
            vocab_size=len(one.tokenizer),
            bits_per_byte=_bits_per_byte(part, measured[0], kinds),
            fertility=part.fertility,
            tasks=part.tasks,
            answers=part.answers,
            speed=speeds.get(one.name),
        )
        for one, part in zip(taking_part, measured, strict=True)
    ]
    if config.ngram_order:
        first = taking_part[0]
        part = _ngram(home, first, corpus, held_out, config, bars)
        columns.append(
            ModelFigures(
                name=f"{config.ngram_order}-gram over the tokens of {first.name}",
                folder=None,
                fingerprint=None,
                num_parameters=None,
                vocab_size=len(first.tokenizer),
                bits_per_byte=_bits_per_byte(part, measured[0], kinds),
                fertility={},
                tasks={},
                answers=[],
                speed=None,
            )
        )
    evaluation = Evaluation(
        created=datetime.now(UTC),
        dataset=corpus.dataset,
        corpus=corpus.fingerprint,
        split=config.split,
        until=corpus.until,
        examples=examples_fingerprint(examples) if examples else None,
        config=asdict(config),
        git_revision=git_revision(),
        models=columns,
    )
    evaluation.save(home.evaluations / EVALUATION_FILE)
    return evaluation


def _open(folders: Sequence[Path], device: torch.device) -> list[_Model]:
    """Load the models; names that two share get their parents' in front."""
    paths = [folder.expanduser().resolve() for folder in folders]
    names = [path.name for path in paths]
    found = []
    for path in dict.fromkeys(paths):
        model, tokenizer = load_language_model(path)
        name = path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}"
        found.append(_Model(name, path, model_fingerprint(path), model.to(device), tokenizer))
    return found


def _measured(
    home: Home,
    one: _Model,
    corpus: CorpusManifest,
    held_out: dict[str, HeldOut],
    examples: Sequence[Example],
    config: EvaluationConfig,
    bars: ProgressBars,
) -> Measured:
    path, part = kept(
        home,
        [
            *(one.fingerprint, corpus.fingerprint, config.split, config.document_bytes),
            examples_fingerprint(examples),
        ],
    )
    if part is None:
        part = measure_model(one.model, one.tokenizer, held_out, examples, name=one.name, bars=bars)
        part.save(path)
    return part


def _ngram(
    home: Home,
    first: _Model,
    corpus: CorpusManifest,
    held_out: dict[str, HeldOut],
    config: EvaluationConfig,
    bars: ProgressBars,
) -> Measured:
    """The baseline reads the first model's tokens, and learns from the same training split."""
    path, part = kept(
        home,
        [
            *(
                tokenizer_fingerprint(first.tokenizer),
                corpus.fingerprint,
                config.split,
                config.document_bytes,
            ),
            *("ngram", config.ngram_order, config.ngram_bytes),
        ],
    )
    if part is None:
        learned = draw_documents(home, corpus, "train", config.ngram_bytes)
        texts = [text for documents in learned.values() for text in documents.texts]
        part = measure_ngram(first.tokenizer, texts, held_out, order=config.ngram_order, bars=bars)
        part.save(path)
    return part


def _speeds(
    taking_part: Sequence[_Model],
    held_out: dict[str, HeldOut],
    config: EvaluationConfig,
    bars: ProgressBars,
) -> dict[str, SpeedFigures]:
    """Measured anew each time, all models in turn: a speed is one of this moment's machine."""
    if not config.speed_rounds:
        return {}
    texts = _texts_that_fit(taking_part, held_out, config)
    with bars("speed") as progress:
        found = measure_speeds(
            {one.name: (one.model, one.tokenizer) for one in taking_part},
            texts,
            rounds=config.speed_rounds,
            progress=progress,
        )
    return {name: _speed_figures(speed) for name, speed in found.items()}


def _texts_that_fit(
    taking_part: Sequence[_Model], held_out: dict[str, HeldOut], config: EvaluationConfig
) -> list[str]:
    """The same texts for all models, shorter where one of them is: its tokens, or its length."""
    characters = config.speed_characters
    while True:
        texts = texts_to_write(held_out, num=config.speed_texts, characters=characters)
        if characters == 1 or all(
            # With the start token.
            max(map(len, token_ids(one.tokenizer, texts)))
            < one.model.config.max_position_embeddings
            for one in taking_part
        ):
            return texts
        characters //= 2


def _speed_figures(speed: Speed) -> SpeedFigures:
    return SpeedFigures(
        characters_per_s=speed.characters_per_s,
        tokens_per_s=speed.tokens_per_s,
        characters_per_token=speed.characters_per_token,
        seconds=speed.seconds,
    )


def _bits_per_byte(
    part: Measured, first: Measured, kinds: dict[str, Literal["domain", "general"]]
) -> dict[str, BitsPerByte]:
    """Of every source and of every kind, with the paired difference from the first model."""
    groups = {
        kind: [source for source, of in kinds.items() if of == kind]
        for kind in ("domain", "general")
    }
    groups |= {source: [source] for source in kinds}
    found = {}
    for name, sources in groups.items():
        if not sources:
            continue
        bits = np.concatenate([part.sources[source].bits for source in sources])
        before = np.concatenate([first.sources[source].bits for source in sources])
        num_bytes = np.concatenate([part.sources[source].num_bytes for source in sources])
        low, high = ratio_interval(bits, num_bytes) or (None, None)
        less, more = ratio_interval(bits - before, num_bytes) or (None, None)
        found[name] = BitsPerByte(
            value=float(bits.sum() / num_bytes.sum()),
            low=low,
            high=high,
            difference=float((bits - before).sum() / num_bytes.sum()),
            difference_low=less,
            difference_high=more,
            num_documents=len(bits),
            num_bytes=int(num_bytes.sum()),
        )
    return found
