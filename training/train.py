"""One training run, from impressions to an artifact folder."""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from encoders.checkpoint import checkpoint_folder
from encoders.devices import Devices, deterministic_algorithms, open_devices, torch_threads
from encoders.loaded_artifact import open_programs
from encoders.tracking import Tracker, check_tracker, final_figures, open_tracker
from feature_repo.artifact import (
    MANIFEST_FILE,
    PROGRAM_FILE,
    REFERENCE_FILE,
    WEIGHTS_FILE,
    set_current_run,
)
from feature_repo.errors import ArtifactError, DataSetError
from feature_repo.home import Home, complete_folder
from feature_repo.progress import Progress, part_of, silent
from training.artifact import (
    describe_recipe,
    save_weights,
)
from training.baselines import ScoreBaseline
from training.bootstrap import Scores
from training.build import build_model, fit_inputs, pretrained_layers, texts_to_read
from training.calibration import CalibratedModel, calibrate, fit_calibration, fit_platt
from training.checkpoint import RunCheckpoint, find_unfinished, open_run_checkpoint
from training.dataset import ClickData, read_clicks
from training.identity import check_run_name, new_run_name, run_fingerprint
from training.impressions import load_impressions
from training.loop import LoopResult, TrainingLoop
from training.manifest import artifact_manifest, input_schema
from training.metrics import summarize
from training.parts import save_parts
from training.program import save_program
from training.recipes import Recipe
from training.reference import training_reference
from training.schema import InputSchema
from training.scoring import probabilities, score
from training.sources import Sources
from training.trees import Trees


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run tells."""

    run: str
    folder: Path
    num_rows: int
    num_contexts: int
    num_processes: int
    """That learned together."""
    resumed: bool
    rows_per_s: float | None
    """Learned from in this call, all processes together, without reading, validations and writing;
    None where nothing was learned step by step."""
    seconds: float
    """Of this call: reading, training, evaluating, writing."""
    metrics: dict[str, dict[str, Any]]
    """Split -> metric -> value."""
    history: list[dict[str, Any]]
    """One entry per validation."""


def train(
    sources: Sources,
    recipe: Recipe,
    *,
    run: str | None = None,
    threads: int | None = None,
    make_current: bool | None = None,
    data: Mapping[str, ClickData] | None = None,
    devices: Devices | None = None,
    track: str | None = None,
    reading: Progress = silent,
    learning: Progress = silent,
    scoring: Progress = silent,
) -> TrainingResult:
    """Train a recipe and write its artifact.

    A run of the same recipe, data and encoder that was killed goes on where it was. Where several
    processes train one run, each of them calls this and gets the same result; the main one writes.

    Args:
        sources: What to read from.
        recipe: What to train.
        run: Name of the run; None = ``<recipe>-<YYYYMMDD-HHMMSS>``.
        threads: Of the arithmetic; None = see :func:`encoders.devices.torch_threads`.
        make_current: Make it the run that is served; None = unless it is a baseline.
        data: What :func:`read_splits` returned, for several recipes on one reading; None = read.
        devices: Of :func:`encoders.devices.open_devices`; None = opened here.
        track: Where curves go, one of :data:`encoders.tracking.TRACKERS`; None = nowhere.
        reading: Told impressions read.
        learning: Told rows learned from, and the loss.
        scoring: Told rows scored after that, of the validation and test splits.

    Raises:
        ArtifactError: If a finished run of this name exists.
        DataSetError: If there are no impressions, or all labels of the train split are equal.
        LongtrailError: If the package of the tracker is not installed.
    """
    started = time.monotonic()
    home = sources.home
    check_tracker(track)
    if run is not None:
        _check_free(home, run)
    with ExitStack() as stack:
        if devices is None:
            devices = stack.enter_context(open_devices())
        local = devices.num_local_processes
        stack.enter_context(torch_threads(threads, num_local_processes=local))
        stack.enter_context(deterministic_algorithms(recipe.training.deterministic))
        if not devices.is_main:
            reading = learning = silent
        extra = recipe.training.extra_requests
        data = data or read_splits(sources, recipe.sequence_length, reading, with_extra=extra)
        data = {split: rows.last(recipe.sequence_length) for split, rows in data.items()}
        is_extra = data["train"].impressions.extra
        if is_extra.any() and not extra:
            data["train"] = data["train"].where(~is_extra)
        if recipe.training.context_share < 1:
            data["train"] = data["train"].sample(
                recipe.training.context_share, seed=recipe.training.seed
            )
        rate = float(data["train"].clicked.mean())
        if not 0 < rate < 1:
            raise DataSetError(
                f"every impression of the train split has clicked = {rate:.0f}: a model needs both "
                "clicked and other rows"
            )
        fingerprint = run_fingerprint(recipe, data, sources.table.fingerprint, devices.device.type)
        name = devices.agree(
            run or find_unfinished(home, recipe.name, fingerprint) or new_run_name(recipe.name)
        )
        _check_free(home, name)
        checkpoint = stack.enter_context(
            open_run_checkpoint(home, name, fingerprint, main=devices.is_main)
        )
        devices.wait()  # until the main process holds the folder
        state = checkpoint.state()
        tracker = stack.enter_context(
            open_tracker(
                track if devices.is_main else None, home, name, step=state.step if state else 0
            )
        )
        tracker.settings(describe_recipe(recipe))
        schema = input_schema(sources, recipe, data["train"])
        model, learned = _fit(
            sources, recipe, schema, data, rate, checkpoint, devices, tracker, learning
        )
        metrics: dict[str, dict[str, Any]] = {}
        if devices.is_main:
            with complete_folder(home.runs / name) as part:
                save_weights(model, part / WEIGHTS_FILE)
                valid = data["valid"]
                update = part_of(scoring, len(valid) + len(data["test"]))
                logits = score(model, _table(sources), valid, truncate=True, progress=update)
                calibration = fit_calibration(logits, valid.clicked, valid.user_codes)
                parts = save_parts(model, calibration, schema, part)
                if parts is None:
                    save_program(CalibratedModel(model, calibration), schema, part / PROGRAM_FILE)
                metrics["valid"] = _metrics(valid, calibrate(calibration, logits))
                manifest = artifact_manifest(
                    sources,
                    recipe,
                    schema,
                    name,
                    data["train"],
                    learned.history,
                    calibration=calibration,
                    parts=parts,
                )
                program = open_programs(part, manifest).score  # what serving runs
                logits = score(
                    program, _table(sources), data["test"], truncate=False, progress=update
                )
                metrics["test"] = _metrics(data["test"], logits)
                manifest = manifest.model_copy(update={"metrics": metrics})
                reference = training_reference(data["train"], sources.table, schema.scenes)
                reference.save(part / REFERENCE_FILE)
                manifest.save(part / MANIFEST_FILE)
            if make_current or (make_current is None and not recipe.baseline):
                set_current_run(home, name)
            last = learned.history[-1]["step"] if learned.history else 0
            tracker.figures(last, final_figures(metrics))
        return TrainingResult(
            run=name,
            folder=home.runs / name,
            num_rows=len(data["train"]),
            num_contexts=data["train"].num_contexts,
            num_processes=devices.num_processes,
            resumed=state is not None,
            rows_per_s=learned.rows_per_s,
            seconds=time.monotonic() - started,
            metrics=devices.agree(metrics),
            history=learned.history,
        )


def _check_free(home: Home, name: str) -> None:
    """Refuse a name that is no folder's, or a finished run's."""
    check_run_name(name)
    # Killed between the artifact and the end, the run ends once more.
    if (home.runs / name).exists() and not checkpoint_folder(home.runs / name).exists():
        raise ArtifactError(f"there is a run {name!r} already: give another --run")


def read_splits(
    sources: Sources,
    sequence_length: int,
    progress: Progress = silent,
    *,
    with_extra: bool = True,
) -> dict[str, ClickData]:
    """The features of all impressions, by split.

    Args:
        sources: What to read from.
        sequence_length: M, behaviours per scene.
        progress: Told impressions read.
        with_extra: Among the train split's also the requests sampled beside the given ones;
            :func:`train` leaves them out again for a recipe that does not want them.
    """
    splits = ("train", "valid", "test")
    tables = {
        split: load_impressions(
            sources.home, sources.manifest, split, with_extra=with_extra and split == "train"
        )
        for split in splits
    }
    all_rows = sum(len(table) for table in tables.values())
    update = part_of(progress, all_rows)

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


def _table(sources: Sources) -> Tensor:
    return torch.from_numpy(sources.table.vectors)


def _fit(
    sources: Sources,
    recipe: Recipe,
    schema: InputSchema,
    data: dict[str, ClickData],
    base_rate: float,
    checkpoint: RunCheckpoint,
    devices: Devices,
    tracker: Tracker,
    progress: Progress,
) -> tuple[nn.Module, LoopResult]:
    """The trained model, on the CPU, and how it went."""
    train_data, table = data["train"], _table(sources)
    torch.manual_seed(recipe.training.seed)
    layers = pretrained_layers(recipe.model, sources)
    torch.manual_seed(recipe.training.seed)  # loading may have drawn
    model = build_model(recipe.model, schema, layers)
    users, items = train_data.users, train_data.items
    fit_inputs(
        model,
        sources.table.vectors,
        (users.user_dense, items.candidate_dense, train_data.context, train_data.evidence),
        base_rate=base_rate,
        item_keys=(users.history_item_keys, items.candidate_item_keys),
        behaviors=texts_to_read(recipe.model, sources),
    )
    for module in model.modules():
        if isinstance(module, Trees):
            module.fit(train_data, data["valid"], seed=recipe.training.seed)
    if isinstance(model, ScoreBaseline):
        fit_score(model, table, train_data)
    if not recipe.training.epochs:
        return model.eval(), LoopResult(history=[], rows_per_s=None)
    loop = TrainingLoop(
        model=model.to(devices.device),
        table=table.to(devices.device),
        train=train_data,
        valid=data["valid"],
        config=recipe.training,
        checkpoint=checkpoint,
        progress=progress,
        devices=devices,
        tracker=tracker,
    )
    learned = loop.run()
    return model.to("cpu"), learned


def fit_score(model: ScoreBaseline, table: Tensor, data: ClickData) -> None:
    """Fit slope and bias of a score to the labels, by logistic regression."""
    scores = score(model, table, data, truncate=True)
    slope, bias = fit_platt(scores, data.clicked)
    with torch.no_grad():
        model.slope.fill_(slope)
        model.bias.fill_(bias)


def _metrics(rows: ClickData, logits: Scores) -> dict[str, Any]:
    return summarize(rows.clicked, probabilities(logits), rows.user_codes)
