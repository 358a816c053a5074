"""The models of the quality benchmark, by name: which are trained, and which compared.

These names are those of the models in the result file; they stand here alone.
"""

import importlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from feature_repo.progress import BarLine, progress_bar
from training.ablations import already_trained, plan_variants
from training.evaluate import ScoredRows, score_runs
from training.overrides import override
from training.recipes import RECIPES, Recipe
from training.sources import Sources
from training.train import read_splits, train

BASELINES = (
    "popularity",
    "repeat_count",
    "item_only",
    "mean_pooling",
    "din_ids",
    "din_text",
    "dcn_v2",
)
TREES = "trees"
LIGHTGBM = "trees_lightgbm"
FAST = "bahe_fast"
SINGLE = "bahe_base"
TOGETHER = "bahe_with_trees"
GIVEN = "_given_rows"
"""Ends the name of a model that learns from the given training rows alone."""
SAME_BUDGET = "bahe_same_budget"
"""The single BAHE recipe by :func:`one_pass`; two other benchmarks start from it."""

Seeded = list[tuple[Recipe, str]]
"""Recipes with their runs."""

_GIVEN_ROWS = "training.extra_requests=false"


def one_pass(name: str, *settings: str) -> Recipe:
    """A recipe in one pass over the given rows, with settings as ``longtrail train --set``."""
    return override(RECIPES[name](), (*settings, _GIVEN_ROWS, "training.epochs=1"))


def why_not_loaded(package: str) -> str | None:
    """Why a package cannot be imported, with a shared library that it needs; None where it can."""
    try:
        importlib.import_module(package)
    except (ImportError, OSError) as error:
        return str(error)
    return None


def planned(sources: Sources, *, num_seeds: int, lightgbm: bool) -> dict[str, Seeded]:
    """What is trained for each model, in the order of the table.

    The single BAHE recipe goes by the names of its ablations' full model, so that those find it.

    Args:
        sources: What is read from; the trainings on the given rows alone are left out where there
            are no others.
        num_seeds: Of the single BAHE recipe; all others have one.
        lightgbm: Whether LightGBM can be loaded.
    """
    whole = (*BASELINES, TREES, *((LIGHTGBM,) if lightgbm else ()), FAST, SINGLE, TOGETHER)
    plan = {name: [once(RECIPES[name](), name)] for name in whole}
    variants, _ = plan_variants(sources, RECIPES[SINGLE](), num_seeds=num_seeds)
    plan[SINGLE] = variants[0].seeded()
    if sources.manifest.impressions == "sampled":
        for name in (rival_of(plan), SINGLE):
            plan[name + GIVEN] = [once(override(RECIPES[name](), [_GIVEN_ROWS]), name + GIVEN)]
    return plan


def once(recipe: Recipe, name: str) -> tuple[Recipe, str]:
    """With the recipe's own seed; never the run that is served."""
    return replace(recipe, baseline=True), f"quality-{name}"


def rival_of(models: Collection[str]) -> str:
    """The trees to beat among the models."""
    return LIGHTGBM if LIGHTGBM in models else TREES


def compared_models(models: Collection[str]) -> Iterator[tuple[str, str]]:
    """Pairs of models, of those that there are, whose difference is measured: model, rival."""
    rival = rival_of(models)
    for pair in dict.fromkeys(
        (
            (SINGLE, rival),
            (SINGLE, TREES),
            (TOGETHER, rival),
            (TOGETHER, TREES),
            (SINGLE + GIVEN, rival + GIVEN),
            (SINGLE, SINGLE + GIVEN),
            (rival, rival + GIVEN),
        )
    ):
        if set(pair) <= set(models):
            yield pair


def train_missing(sources: Sources, wanted: Seeded, threads: int) -> None:
    """Train the runs that are not there yet, on one reading of the features.

    Raises:
        ArtifactError: If a run of such a name was trained with other settings, data or vectors.
    """
    missing = [(recipe, run) for recipe, run in wanted if not already_trained(sources, recipe, run)]
    if not missing:
        return
    longest = max(recipe.sequence_length for recipe, _ in missing)
    with_extra = any(recipe.training.extra_requests for recipe, _ in missing)
    with progress_bar("read features", "impressions") as progress:
        data = read_splits(sources, longest, progress, with_extra=with_extra)
    for recipe, run in missing:
        with BarLine() as bars:
            train(
                sources,
                recipe,
                run=run,
                threads=threads,
                data=data,
                learning=bars.bar(f"train {run}", "impressions"),
                scoring=bars.bar(f"score {run}", "impressions"),
            )


def score_all(sources: Sources, of: Mapping[str, Collection[str]]) -> ScoredRows:
    """Score the runs of every model on one reading of the test rows.

    Args:
        sources: Where they were trained.
        of: Model -> its runs.
    """
    with BarLine() as bars:
        return score_runs(
            sources,
            [run for runs in of.values() for run in runs],
            reading=bars.bar("read features", "impressions"),
            scoring=bars.bar("score", "impressions"),
        )
