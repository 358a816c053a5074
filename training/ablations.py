"""What each part of a model is worth: the same training without it, tested on the same rows.

Every ablation is a function from a recipe to a recipe, like :mod:`training.recipes`. Budget, seeds
and features are those of the full model.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from encoders.table import table_encoders
from encoders.tuning import MANIFEST_FILE as TUNING_FILE
from encoders.tuning import TuningManifest
from feature_repo.artifact import MANIFEST_FILE, load_run_manifest
from feature_repo.errors import ArtifactError
from feature_repo.progress import Progress, in_rounds, silent
from training.artifact import describe_recipe
from training.config import BaheConfig
from training.evaluate import Evaluation, ScoredRows, measure, score_runs
from training.recipes import Recipe, TrainingConfig
from training.sources import Sources
from training.train import read_splits, train


def _changed(recipe: Recipe, **values: Any) -> Recipe:
    """A recipe with other fields of its model."""
    return replace(recipe, model=replace(recipe.model, **values))


def without_text(recipe: Recipe) -> Recipe:
    """Nothing of any text: ids, times and numbers remain."""
    return _changed(
        recipe,
        use_text=False,
        use_deep_half=False,
        use_text_evidence=False,
        use_target_attention=False,
        next_behavior_weight=0.0,
    )


def without_deep_half(recipe: Recipe) -> Recipe:
    """Pooled text vectors in place of the language model's upper layers."""
    return _changed(recipe, use_deep_half=False)


def without_age(recipe: Recipe) -> Recipe:
    """Pooling, text evidence and attention know the order of behaviours alone.

    The ages that are numbers remain: the recencies of exact-id and neighbour evidence, and those
    among the user's and the item's features.
    """
    return _changed(recipe, use_age=False)


def without_exact_id(recipe: Recipe) -> Recipe:
    """Nothing says by its id that the candidate itself is in the history.

    No number, no attention, no vectors of ids, where there are any (which know other items, too).
    Its text can still say so: a behaviour of the same text has a cosine of 1 in attention, and the
    deep half reads it. Text evidence leaves the candidate's own behaviours out, as ever.
    """
    return _changed(recipe, use_exact_evidence=False, id_width=None)


def frozen_deep_half(recipe: Recipe) -> Recipe:
    """The deep half keeps its pretrained weights."""
    if isinstance(recipe.model, BaheConfig) and not recipe.model.use_deep_half:
        return recipe
    return _changed(recipe, fine_tune="frozen", num_trained_layers=None)


ABLATIONS: dict[str, Callable[[Recipe], Recipe]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        without_text,
        without_deep_half,
        without_age,
        without_exact_id,
        frozen_deep_half,
    )
}
FULL = "full"
UNTUNED = "untuned-encoder"
"""The full model on the vectors of the language model as it was before domain tuning."""


@dataclass(frozen=True)
class Variant:
    """One recipe of the study, trained once per seed."""

    name: str
    recipe: Recipe
    """With the first seed."""
    sources: Sources
    """Of its encoder."""
    runs: list[str]

    def seeded(self) -> list[tuple[Recipe, str]]:
        """The recipe with each seed, and its run."""
        first = self.recipe.training
        return [
            (replace(self.recipe, training=replace(first, seed=first.seed + offset)), run)
            for offset, run in enumerate(self.runs)
        ]


@dataclass(frozen=True)
class AblationStudy:
    """The full model and its variants on the same rows."""

    recipe: str
    rows: str
    evaluations: dict[str, Evaluation]
    """Variant -> figures, compared with the full model's; :data:`FULL` comes first."""
    scored: ScoredRows
    trained: list[str]
    """Runs that this call trained; the others were there."""
    notes: list[str]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Everything but the rows themselves."""
        return {
            "recipe": self.recipe,
            "rows": self.rows,
            "variants": {name: asdict(found) for name, found in self.evaluations.items()},
            "trained": self.trained,
            "notes": self.notes,
            "seconds": round(self.seconds, 1),
        }


def ablate(
    sources: Sources,
    recipe: Recipe,
    *,
    num_seeds: int = 1,
    split: str = "test",
    ablations: Mapping[str, Callable[[Recipe], Recipe]] = ABLATIONS,
    threads: int | None = None,
    reading: Progress = silent,
    bar: Callable[[str], Progress] = lambda title: silent,  # noqa: ARG005
    scoring: Progress = silent,
) -> AblationStudy:
    """Train a recipe and its ablations with the same budget, and test each against the full model.

    The features are read once per encoder. Runs are named ``<recipe>-<variant>-seed<n>`` and never
    become the one that is served; finished ones are not trained again, killed ones go on.

    Args:
        sources: What to read from.
        recipe: The full model, of a bahe recipe.
        num_seeds: Runs per variant, with the seeds from the recipe's on.
        split: On which the variants are compared.
        ablations: Name -> what it does to a recipe; one that changes nothing is left out.
        threads: Of the arithmetic.
        reading: Told impressions read.
        bar: Title -> who is told of that step of a training, in impressions.
        scoring: Told rows scored.

    Raises:
        ArtifactError: If the recipe is not of a bahe model, or a run of such a name was trained
            with other settings.
    """
    started = time.monotonic()
    if not isinstance(recipe.model, BaheConfig):
        raise ArtifactError(
            f"ablations take parts out of a bahe model, but {recipe.name!r} is none: give "
            "--recipe bahe_small or another bahe recipe"
        )
    if num_seeds < 1:
        raise ArtifactError(f"--seeds must be at least 1, got {num_seeds}")
    variants, notes = plan_variants(sources, recipe, num_seeds=num_seeds, ablations=ablations)
    pending = [
        (variant, seeded, run)
        for variant in variants
        for seeded, run in variant.seeded()
        if not already_trained(variant.sources, seeded, run)
    ]
    # What is read holds rows of a table and cosines of its vectors: one reading per encoder.
    num_readings = len({variant.sources.table.fingerprint for variant, _, _ in pending})
    read_from, data = None, {}
    for variant, seeded, run in pending:
        if read_from is not variant.sources:
            read_from = variant.sources
            progress = in_rounds(reading, num_readings)
            data = read_splits(
                read_from,
                recipe.sequence_length,
                progress,
                with_extra=recipe.training.extra_requests,
            )
        train(
            variant.sources,
            seeded,
            run=run,
            threads=threads,
            make_current=False,
            data=data,
            learning=bar(f"training {run}"),
            scoring=bar(f"scoring {run}"),
        )
    trained = [run for _, _, run in pending]
    del data
    runs = [run for variant in variants for run in variant.runs]
    scored = score_runs(
        sources, runs, split=split, reading=silent if trained else reading, scoring=scoring
    )
    full = variants[0].runs
    evaluations = {
        variant.name: measure(
            scored,
            variant.runs,
            against=[] if variant.name == FULL else full,
            started=time.monotonic(),
        )
        for variant in variants
    }
    return AblationStudy(
        recipe=recipe.name,
        rows=scored.rows,
        evaluations=evaluations,
        scored=scored,
        trained=trained,
        notes=notes,
        seconds=time.monotonic() - started,
    )


def plan_variants(
    sources: Sources,
    recipe: Recipe,
    *,
    num_seeds: int = 1,
    ablations: Mapping[str, Callable[[Recipe], Recipe]] = ABLATIONS,
) -> tuple[list[Variant], list[str]]:
    """What :func:`ablate` trains.

    Returns:
        The variants, the full model first, and why some are missing.
    """
    notes = []
    chosen = [(FULL, recipe, sources)]
    for name, ablation in ablations.items():
        changed = ablation(recipe)
        if changed == recipe:
            notes.append(f"{name} left out: {recipe.name} has no such part")
        else:
            chosen.append((name, changed, sources))
    untuned = _untuned(sources)
    if isinstance(untuned, Sources):
        chosen.append((UNTUNED, recipe, untuned))
    else:
        notes.append(f"{UNTUNED} left out: {untuned}")
    variants = []
    for name, changed, own in chosen:
        label = f"{recipe.name}-{name}"
        seeds = range(recipe.training.seed, recipe.training.seed + num_seeds)
        variants.append(
            Variant(
                name=name,
                recipe=replace(changed, name=label, baseline=True),
                sources=own,
                runs=[f"{label}-seed{seed}" for seed in seeds],
            )
        )
    return variants, notes


def _untuned(sources: Sources) -> Sources | str:
    """The same on the vectors of the language model before domain tuning, or why not."""
    encoders = table_encoders(sources.home)
    current = [e for e in encoders if e.fingerprint == sources.table.fingerprint]
    if not current or not (Path(current[0].model) / TUNING_FILE).is_file():
        return "the current encoder is not a tuned one"
    tuning = TuningManifest.load(Path(current[0].model) / TUNING_FILE, made_by="longtrail tune")
    unlike = {"model", "model_fingerprint", "fingerprint"}
    for encoder in encoders:
        if encoder.model_fingerprint == tuning.base_model_fingerprint and encoder.model_dump(
            exclude=unlike
        ) == current[0].model_dump(exclude=unlike):
            return sources.with_encoder(encoder.fingerprint)
    return (
        f"{sources.home.root} has no vectors of {tuning.base_model} with the same settings; "
        "`longtrail encode` with it makes them, and with the tuned model again makes that current"
    )


def already_trained(sources: Sources, recipe: Recipe, run: str) -> bool:
    """Whether a run of this very recipe, data and encoder is there.

    Args:
        sources: Whose home, data and vectors are meant.
        recipe: What the run shall have been trained from. A setting that came after the run has its
            default there, which means what was done before.
        run: Name of the run.

    Raises:
        ArtifactError: If a run of this name is there, but of others.
    """
    if not (sources.home.runs / run / MANIFEST_FILE).is_file():
        return False
    manifest = load_run_manifest(sources.home, run)
    expected = _plain(recipe)
    defaults = _plain(replace(recipe, model=type(recipe.model)(), training=TrainingConfig()))
    there = {name: manifest.config[name] for name in expected if name in manifest.config}
    same = (
        _with_defaults(there, defaults) == expected
        and manifest.source_fingerprint == sources.manifest.source_fingerprint
        and manifest.encoder_fingerprint == sources.table.fingerprint
    )
    if not same:
        raise ArtifactError(
            f"run {run!r} was trained with other settings, data or vectors: delete "
            f"{sources.home.runs / run} to train it anew"
        )
    return True


def _plain(recipe: Recipe) -> dict[str, Any]:
    """As a manifest gives it back: lists for tuples."""
    values: dict[str, Any] = json.loads(json.dumps(describe_recipe(recipe)))
    return values


def _with_defaults(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Values, and below them those of ``defaults`` that they lack."""
    inner = {
        name: _with_defaults(value, defaults[name])
        for name, value in values.items()
        if isinstance(value, Mapping) and isinstance(defaults.get(name), Mapping)
    }
    return {**defaults, **values, **inner}
