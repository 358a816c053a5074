"""The table of the README: every recipe on one data set, with intervals and paired comparisons.

One home folder holds everything: features, the vectors of the plain and of the domain-tuned
language model, and one run per recipe and seed. What is there already is not made again, so a
benchmark that was killed goes on.

- ``comparison``: the best single BAHE recipe against gradient-boosted trees (LightGBM where it can
  be loaded), mean over seeds, users drawn with replacement.
- ``downstream``: BAHE and trees together, one seed, against the trees alone, likewise.
- ``*_given_rows``: trees and the single BAHE recipe, one seed, without the requests that ingest
  samples beside the given training rows (``negatives.extra_train``); all others learn from them.
- ``full_text`` (only with ``--full-text``, it takes as long as all the rest): the whole language
  model over the last 256 tokens of the history against the BAHE recipe, both with the same numbers
  beside the texts, on the given training rows, one pass.
- ``ablations``: the BAHE recipe without each of its parts, against the full one, on all rows and on
  the slices fixed beforehand (``novel``, ``cold_items``, ``history_1_20``).

    python -m benchmarks.bench_quality
"""

import argparse
import importlib
import logging
import time
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.results_file import write_result
from encoders.config import EncoderConfig, TuningConfig
from encoders.devices import torch_threads
from encoders.encode import encode_behaviors
from encoders.tuning import tune
from feature_repo.artifact import MANIFEST_FILE
from feature_repo.cli import build_features
from feature_repo.command import Settings, say
from feature_repo.dataset import load_dataset
from feature_repo.home import Home
from feature_repo.ingest import ingest
from feature_repo.materialize import apply
from feature_repo.progress import late_bar, progress_bar
from training.ablations import FULL, ablate, plan_variants
from training.evaluate import Evaluation, measure, score_runs
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
    "trees",
    "bahe_fast",
)
LIGHTGBM = "trees_lightgbm"
SINGLE = "bahe_base"
TOGETHER = "bahe_with_trees"
GIVEN = "_given_rows"
"""Ends the name of a model that learns from the given training rows alone."""
FULL_TEXT = "full_text_numeric"
SAME_BUDGET = "bahe_same_budget"
"""The BAHE recipe with the budget of :data:`FULL_TEXT`."""
SHOWN = ("auc", "auc_low", "auc_high", "gauc", "logloss", "ne", "calibration_error")


def prepare(home: Home, dataset: Path, *, tuned: Path | None) -> Settings:
    """Tables, features, plain vectors and, unless ``tuned`` is None, those of the tuned model."""
    settings = Settings(home, "embedded")
    with progress_bar("ingest", "steps") as progress:
        ingest(home, load_dataset(dataset), progress=progress)
    with progress_bar("encode", "texts") as progress:
        encode_behaviors(home, EncoderConfig(), progress)
    if tuned is not None:
        if not tuned.exists():
            with progress_bar("tune", "steps") as progress:
                tune(home, TuningConfig(), tuned, progress=progress)
        with progress_bar("encode with the tuned model", "texts") as progress:
            encode_behaviors(home, EncoderConfig(model=str(tuned)), progress)
    build_features(settings)
    apply(home, settings.profile)
    return settings


def has_lightgbm() -> bool:
    """Whether LightGBM can be loaded; its wheel needs the system's libgomp."""
    try:
        importlib.import_module("lightgbm")
    except (ImportError, OSError):
        return False
    return True


Seeded = list[tuple[Recipe, str]]
"""Recipes with their runs."""


def planned(
    sources: Sources, names: list[str], num_seeds: int, *, full_text: bool
) -> dict[str, Seeded]:
    """What is trained for each model.

    The single BAHE recipe goes by the names of its ablations' full model, so that those find it.
    """
    plan: dict[str, Seeded] = {}
    for name in names:
        recipe = RECIPES[name]()
        plan[name] = [(replace(recipe, baseline=True), f"quality-{name}")]
    rival = LIGHTGBM if LIGHTGBM in names else "trees"
    if sources.manifest.impressions == "sampled":
        for name in (rival, SINGLE):
            given = override(RECIPES[name](), ["training.extra_requests=false"])
            plan[name + GIVEN] = [(replace(given, baseline=True), f"quality-{name}{GIVEN}")]
    if full_text:
        options = ["training.extra_requests=false", "training.epochs=1"]
        whole = override(RECIPES["full_text"](), ["model.use_numeric=true", *options])
        plan[FULL_TEXT] = [(whole, f"quality-{FULL_TEXT}")]
        short = override(RECIPES[SINGLE](), options)
        plan[SAME_BUDGET] = [(replace(short, baseline=True), f"quality-{SAME_BUDGET}")]
    variants, _ = plan_variants(sources, RECIPES[SINGLE](), num_seeds=num_seeds)
    plan[SINGLE] = variants[0].seeded()
    return plan


def train_missing(sources: Sources, wanted: Seeded, threads: int) -> None:
    """Train the runs that are not there yet, on one reading of the features."""
    missing = [
        (recipe, run)
        for recipe, run in wanted
        if not (sources.home.runs / run / MANIFEST_FILE).is_file()
    ]
    if not missing:
        return
    longest = max(recipe.sequence_length for recipe, _ in missing)
    with progress_bar("read features", "impressions") as progress:
        data = read_splits(sources, longest, progress)
    for recipe, run in missing:
        with progress_bar(f"train {run}", "impressions") as progress:
            train(sources, recipe, run=run, threads=threads, data=data, learning=progress)


def figures(evaluation: Evaluation) -> dict[str, Any]:
    """The figures of one model for the result file."""
    return {
        "runs": evaluation.runs,
        **{name: evaluation.metrics[name] for name in SHOWN},
        "slices": {
            name: {key: values[key] for key in ("num_rows", "auc", "auc_low", "auc_high", "gauc")}
            for name, values in evaluation.slices.items()
        },
    }


def compared(evaluation: Evaluation) -> dict[str, Any]:
    """``all`` or slice -> figure -> difference with its interval."""
    return {
        rows: {
            figure: {key: values[key] for key in ("difference", "low", "high")}
            for figure, values in by_figure.items()
        }
        for rows, by_figure in evaluation.comparison.items()
    }


def measure_all(
    home: Home,
    dataset: Path,
    *,
    num_seeds: int,
    threads: int,
    tuned: Path | None,
    ablations: bool,
    full_text: bool,
) -> dict[str, Any]:
    """Train, score and compare everything.

    Args:
        home: Where everything is kept.
        dataset: Data set file.
        num_seeds: Seeds of the BAHE recipes.
        threads: Of the arithmetic.
        tuned: Folder of the tuned language model, made where it is not there; None = no tuning.
        ablations: Also train the BAHE recipe without each of its parts.
        full_text: Also train the language model over the full text.
    """
    began = time.perf_counter()
    settings = prepare(home, dataset, tuned=tuned)
    sources = Sources.open(home, settings.profile)
    names = [*BASELINES, SINGLE, TOGETHER]
    if has_lightgbm():
        names.insert(len(BASELINES), LIGHTGBM)
    with torch_threads(threads):
        plan = planned(sources, names, num_seeds, full_text=full_text)
        of = {name: [run for _, run in runs] for name, runs in plan.items()}
        train_missing(sources, [pair for runs in plan.values() for pair in runs], threads)
        with ExitStack() as stack:
            scored = score_runs(
                sources,
                [run for runs in of.values() for run in runs],
                reading=late_bar(stack, "read features", "impressions"),
                scoring=late_bar(stack, "score", "impressions"),
            )
        rival = LIGHTGBM if LIGHTGBM in of else "trees"
        against = {SINGLE: of[rival], TOGETHER: of[rival], SAME_BUDGET: of.get(FULL_TEXT, ())}
        found = {
            name: measure(scored, of[name], against=against.get(name, ()), started=began)
            for name in plan
        }
        studied: dict[str, Evaluation] = {}
        notes = list(scored.notes)
        if ablations:
            with ExitStack() as stack:
                study = ablate(
                    sources,
                    RECIPES[SINGLE](),
                    threads=threads,
                    reading=late_bar(stack, "read features", "impressions"),
                    learning=lambda run: late_bar(stack, f"train {run}", "impressions"),
                    scoring=late_bar(stack, "score", "impressions"),
                )
            studied = study.evaluations
            notes += study.notes
    best = found[SINGLE].comparison["all"]["auc"]
    return {
        "dataset": sources.manifest.dataset,
        "rows": scored.rows,
        "num_seeds": num_seeds,
        "threads": threads,
        "encoder": sources.table.fingerprint,
        "comparison": {
            "lightgbm_auc": best["second"],
            "best_auc": best["first"],
            "difference": best["difference"],
            "low": best["low"],
            "high": best["high"],
            "trees": rival,
            "by_slice": compared(found[SINGLE]),
        },
        "downstream": {"together": TOGETHER, "by_slice": compared(found[TOGETHER])},
        "full_text": {"by_slice": compared(found[SAME_BUDGET])} if full_text else {},
        "models": {name: figures(evaluation) for name, evaluation in found.items()},
        "ablations": {
            name: {
                **figures(evaluation),
                "against_full": compared(evaluation) if name != FULL else {},
            }
            for name, evaluation in studied.items()
        },
        "notes": notes,
        "seconds": round(time.perf_counter() - began, 1),
    }


def table(result: dict[str, Any]) -> str:
    """The models as a table for people."""
    lines = [f"{'model':<26}{'AUC':>8}  {'95 % interval':<16}{'GAUC':>8}{'logloss':>9}"]
    for name, values in result["models"].items():
        interval = f"[{values['auc_low']:.4f}, {values['auc_high']:.4f}]"
        lines.append(
            f"{name:<26}{values['auc']:8.4f}  {interval:<16}{values['gauc']:8.4f}"
            f"{values['logloss']:9.4f}"
        )
    best = result["comparison"]
    lines.append(
        f"{SINGLE} - {best['trees']}: {best['difference']:+.4f} [{best['low']:+.4f}, "
        f"{best['high']:+.4f}]"
    )
    together = result["downstream"]["by_slice"]["all"]["auc"]
    lines.append(
        f"{TOGETHER} - {best['trees']}: {together['difference']:+.4f} [{together['low']:+.4f}, "
        f"{together['high']:+.4f}]"
    )
    if result["full_text"]:
        cheaper = result["full_text"]["by_slice"]["all"]["auc"]
        lines.append(
            f"{SAME_BUDGET} - {FULL_TEXT}: {cheaper['difference']:+.4f} [{cheaper['low']:+.4f}, "
            f"{cheaper['high']:+.4f}]"
        )
    for name, values in result["ablations"].items():
        for rows in ("all", "novel", "cold_items", "history_1_20") if name != FULL else ():
            auc = values["against_full"][rows]["auc"]
            if auc["difference"] is not None:
                lines.append(
                    f"{name} - full, {rows}: {auc['difference']:+.4f} [{auc['low']:+.4f}, "
                    f"{auc['high']:+.4f}]"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset", type=Path, default=Path("feature_repo/datasets/online_retail.toml")
    )
    parser.add_argument("--home", type=Path, default=Path("var/quality"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-tuning", action="store_true", help="plain vectors only")
    parser.add_argument(
        "--no-ablations", action="store_true", help="leave out seven more trainings"
    )
    parser.add_argument(
        "--full-text", action="store_true", help="the language model over the full text, too"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.ERROR)
    result = measure_all(
        Home(options.home),
        options.dataset,
        num_seeds=options.seeds,
        threads=options.threads,
        tuned=None if options.no_tuning else options.home / "models" / "tuned",
        ablations=not options.no_ablations,
        full_text=options.full_text,
    )
    say(table(result))
    print(write_result("quality", "python -m benchmarks.bench_quality", result))


if __name__ == "__main__":
    main()
