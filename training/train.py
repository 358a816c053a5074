"""One training run, from impressions to an artifact folder."""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from feature_repo.artifact import (
    MANIFEST_FILE,
    PROGRAM_FILE,
    WEIGHTS_FILE,
    ArtifactManifest,
    set_current_run,
)
from feature_repo.definitions import CTR_SERVICE
from feature_repo.errors import ArtifactError, DataSetError
from feature_repo.home import complete_folder
from feature_repo.progress import Progress, silent
from feature_repo.revision import git_revision
from training.artifact import (
    describe_recipe,
    save_weights,
    versions,
)
from training.baselines import ScoreBaseline
from training.build import build_model, fit_inputs, needs_deep_half
from training.checkpoint import Checkpoint, find_unfinished, open_checkpoint
from training.config import BaheConfig
from training.dataset import ClickData, read_clicks
from training.impressions import load_impressions
from training.loop import TrainingLoop
from training.metrics import summarize
from training.program import load_program, save_program
from training.recipes import Recipe
from training.schema import InputSchema
from training.scoring import probabilities, score
from training.sources import Sources

MIN_SLOPE = 1e-3
"""Of a baseline's score in the logit: above 0, so that calibration never turns the order round."""


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run tells."""

    run: str
    folder: Path
    num_rows: int
    num_contexts: int
    resumed: bool
    seconds: float
    """Of this call: reading, training, evaluating, writing."""
    metrics: dict[str, dict[str, Any]]
    """Split -> metric -> value."""
    history: list[dict[str, Any]]
    """One entry per validation."""


@contextmanager
def torch_threads(number: int | None) -> Iterator[int]:
    """Compute with ``number`` threads (None = one per core), and put the old number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or os.cpu_count() or 1)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def train(
    sources: Sources,
    recipe: Recipe,
    *,
    run: str | None = None,
    threads: int | None = None,
    make_current: bool | None = None,
    data: Mapping[str, ClickData] | None = None,
    reading: Progress = silent,
    learning: Progress = silent,
) -> TrainingResult:
    """Train a recipe and write its artifact.

    A run of the same recipe, data and encoder that was killed goes on where it was.

    Args:
        sources: What to read from.
        recipe: What to train.
        run: Name of the run; None = ``<recipe>-<YYYYMMDD-HHMMSS>``.
        threads: Of the arithmetic; None = one per core.
        make_current: Make it the run that is served; None = unless it is a baseline.
        data: What :func:`read_splits` returned, for several recipes on one reading; None = read.
        reading: Told impressions read.
        learning: Told rows learned from, and the loss.

    Raises:
        ArtifactError: If a finished run of this name exists.
        DataSetError: If there are no impressions, or all labels of the train split are equal.
    """
    started = time.monotonic()
    home = sources.home
    fingerprint = _fingerprint(sources, recipe)
    name = run or find_unfinished(home, recipe.name, fingerprint) or _new_name(recipe.name)
    _check_name(name)
    if (home.runs / name).exists():
        raise ArtifactError(f"there is a run {name!r} already: give another --run")
    with torch_threads(threads), open_checkpoint(home, name, fingerprint) as checkpoint:
        resumed = checkpoint.load() is not None
        data = data or read_splits(sources, recipe.sequence_length, reading)
        data = {split: rows.last(recipe.sequence_length) for split, rows in data.items()}
        rate = float(data["train"].clicked.mean())
        if not 0 < rate < 1:
            raise DataSetError(
                f"every impression of the train split has clicked = {rate:.0f}: a model needs both "
                "clicked and other rows"
            )
        schema = _schema(sources, recipe, data["train"])
        model, history = _fit(sources, recipe, schema, data, rate, checkpoint, learning)
        folder = home.runs / name
        with complete_folder(folder) as part:
            save_weights(model, part / WEIGHTS_FILE)
            save_program(model, schema, part / PROGRAM_FILE)
            metrics = _evaluate(part / PROGRAM_FILE, _table(sources), data)
            manifest = _manifest(sources, recipe, schema, name, data["train"], metrics, history)
            manifest.save(part / MANIFEST_FILE)
    if make_current or (make_current is None and not recipe.baseline):
        set_current_run(home, name)
    return TrainingResult(
        run=name,
        folder=folder,
        num_rows=len(data["train"]),
        num_contexts=data["train"].num_contexts,
        resumed=resumed,
        seconds=time.monotonic() - started,
        metrics=metrics,
        history=history,
    )


def _new_name(recipe: str) -> str:
    return f"{recipe}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


def _check_name(name: str) -> None:
    if not name or Path(name).name != name or name.startswith(".") or name.endswith(".part"):
        raise ArtifactError(f"--run {name!r} is no name for a folder: use letters, digits, - and _")


def _fingerprint(sources: Sources, recipe: Recipe) -> str:
    """Hash of all that decides the weights: settings, data, vectors."""
    parts = {
        "recipe": describe_recipe(recipe),
        "source": sources.manifest.source_fingerprint,
        "encoder": sources.table.fingerprint,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def read_splits(
    sources: Sources, sequence_length: int, progress: Progress = silent
) -> dict[str, ClickData]:
    """The features of all impressions, by split.

    Args:
        sources: What to read from.
        sequence_length: M, behaviours per scene.
        progress: Told impressions read.
    """
    splits = ("train", "valid", "test")
    tables = {split: load_impressions(sources.home, sources.manifest, split) for split in splits}
    all_rows = sum(len(table) for table in tables.values())

    def update(advance: int, total: int, **figures: float) -> None:  # noqa: ARG001
        progress(advance, all_rows, **figures)

    data: dict[str, ClickData] = {}
    for split, table in tables.items():
        first = data.get("train")
        data[split] = read_clicks(
            table,
            sources.reader,
            sources.table,
            scenes=sources.manifest.scenes,
            sequence_length=sequence_length,
            vocabularies=first.category_vocabularies if first else None,
            user_dense_names=first.user_dense_names if first else None,
            item_dense_names=first.item_dense_names if first else None,
            progress=update,
        )
    return data


def _schema(sources: Sources, recipe: Recipe, data: ClickData) -> InputSchema:
    return InputSchema(
        scenes=sources.manifest.scenes,
        # The reader may keep fewer behaviours than the recipe would take.
        sequence_length=min(recipe.sequence_length, data.users.history_rows.shape[-1]),
        vector_width=sources.table.width,
        user_dense_names=data.user_dense_names,
        item_dense_names=data.item_dense_names,
        context_names=data.impressions.context_names,
        category_vocabularies=data.category_vocabularies,
    )


def _table(sources: Sources) -> Tensor:
    return torch.from_numpy(sources.table.vectors)


def _fit(
    sources: Sources,
    recipe: Recipe,
    schema: InputSchema,
    data: dict[str, ClickData],
    base_rate: float,
    checkpoint: Checkpoint,
    progress: Progress,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The trained model, and what its validations said."""
    train_data, table = data["train"], _table(sources)
    torch.manual_seed(recipe.training.seed)
    deep = None
    if needs_deep_half(recipe.model):
        assert isinstance(recipe.model, BaheConfig)
        deep = sources.deep_half(recipe.model.num_deep_layers)
    torch.manual_seed(recipe.training.seed)  # loading may have drawn
    model = build_model(recipe.model, schema, deep)
    dense = (train_data.users.user_dense, train_data.items.candidate_dense, train_data.context)
    fit_inputs(model, sources.table.vectors, dense, base_rate=base_rate)
    if isinstance(model, ScoreBaseline):
        calibrate(model, table, train_data)
        return model.eval(), []
    loop = TrainingLoop(
        model, table, train_data, data["valid"], recipe.training, checkpoint, progress
    )
    return model, loop.run()


def calibrate(model: ScoreBaseline, table: Tensor, data: ClickData) -> None:
    """Fit slope and bias of a score to the labels, by logistic regression."""
    scores = score(model, table, data, truncate=True).astype(np.float64)
    fitted = LogisticRegression(C=np.inf).fit(scores[:, None], data.clicked)
    slope, bias = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    if slope < MIN_SLOPE:
        rate = float(data.clicked.mean())
        slope = MIN_SLOPE
        bias = float(np.log(rate / (1 - rate)) - slope * scores.mean())
    with torch.no_grad():
        model.slope.fill_(slope)
        model.bias.fill_(bias)


def _evaluate(
    program: Path, table: Tensor, data: dict[str, ClickData]
) -> dict[str, dict[str, Any]]:
    """Figures of the exported program, the same that serving runs."""
    scored = load_program(program)
    return {
        split: summarize(
            data[split].clicked,
            probabilities(score(scored, table, data[split], truncate=False)),
            data[split].user_codes,
        )
        for split in ("valid", "test")
    }


def _manifest(
    sources: Sources,
    recipe: Recipe,
    schema: InputSchema,
    run: str,
    train_data: ClickData,
    metrics: dict[str, dict[str, Any]],
    history: list[dict[str, Any]],
) -> ArtifactManifest:
    times = train_data.impressions.times
    start, end = (datetime.fromtimestamp(int(t) / 1e6, UTC) for t in (times.min(), times.max()))
    return ArtifactManifest(
        run=run,
        created=datetime.now(UTC),
        dataset=sources.manifest.dataset,
        source_fingerprint=sources.manifest.source_fingerprint,
        feature_service=CTR_SERVICE,
        scenes=schema.scenes,
        sequence_length=schema.sequence_length,
        user_dense_names=schema.user_dense_names,
        item_dense_names=schema.item_dense_names,
        context_names=schema.context_names,
        category_vocabularies=schema.category_vocabularies,
        encoder_fingerprint=sources.table.fingerprint,
        encoder_width=schema.vector_width,
        recipe=recipe.name,
        config={**describe_recipe(recipe), "validations": history},
        seed=recipe.training.seed,
        git_revision=git_revision(),
        versions=versions(),
        train_start=start,
        train_end=end,
        metrics=metrics,
    )
