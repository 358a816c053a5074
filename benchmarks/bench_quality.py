"""The tables of the README: every recipe on one data set, with intervals and paired comparisons.

One home folder holds everything: features, the vectors of the plain and of the domain-tuned
language model, and one run per recipe and seed. What is there already is not made again, so a
benchmark that was killed goes on.

- ``comparison``: the best single BAHE recipe against gradient-boosted trees (LightGBM where it can
  be loaded; ``against_trees``: scikit-learn's), mean over seeds, users drawn with replacement.
- ``downstream``: BAHE and trees together, one seed, against the trees alone, likewise.
- ``given_rows``: the single BAHE recipe against the trees, one seed each, without the requests that
  ingest samples beside the given training rows (``negatives.extra_train``); all others learn from
  them. ``extra_rows``: what these are worth to each of the two.
- ``ablations``: the BAHE recipe without each of its parts, against the full one, on all rows and on
  every slice.

    python -m benchmarks.bench_quality
"""

import argparse
import logging
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.quality_home import prepare
from benchmarks.quality_page import page
from benchmarks.quality_plan import (
    LIGHTGBM,
    SINGLE,
    compared_models,
    planned,
    score_all,
    train_missing,
    why_not_loaded,
)
from benchmarks.quality_result import result
from benchmarks.results_file import given_command, write_result
from encoders.devices import torch_threads
from feature_repo.command import say
from feature_repo.home import Home
from feature_repo.progress import BarLine
from training.ablations import ablate
from training.evaluate import Evaluation, measure
from training.recipes import RECIPES
from training.sources import Sources


def measure_all(
    home: Home,
    dataset: Path,
    *,
    num_seeds: int,
    threads: int,
    tuned: Path | None,
    ablations: bool,
) -> dict[str, Any]:
    """Train, score and compare everything.

    Args:
        home: Where everything is kept.
        dataset: Data set file.
        num_seeds: Seeds of the BAHE recipes.
        threads: Of the arithmetic.
        tuned: Folder of the tuned language model, made where it is not there; None = no tuning.
        ablations: Also train the BAHE recipe without each of its parts.
    """
    started = time.monotonic()
    settings = prepare(home, dataset, tuned=tuned)
    sources = Sources.open(home, settings.profile)
    notes = []
    if reason := why_not_loaded("lightgbm"):
        notes.append(f"{LIGHTGBM} left out, scikit-learn's trees are the rival: {reason}")
        say(notes[0])
    with torch_threads(threads):
        plan = planned(sources, num_seeds=num_seeds, lightgbm=not reason)
        of = {name: [run for _, run in runs] for name, runs in plan.items()}
        train_missing(sources, [pair for runs in plan.values() for pair in runs], threads)
        scored = score_all(sources, of)
        notes += scored.notes
        models = {name: measure(scored, runs, started=started) for name, runs in of.items()}
        pairs = {
            (name, rival): measure(scored, of[name], against=of[rival], started=started)
            for name, rival in compared_models(plan)
        }
        studied: dict[str, Evaluation] = {}
        if ablations:
            with BarLine() as bars:
                study = ablate(
                    sources,
                    RECIPES[SINGLE](),
                    threads=threads,
                    reading=bars.bar("read features", "impressions"),
                    bar=partial(bars.bar, unit="impressions"),
                    scoring=bars.bar("score", "impressions"),
                )
            studied = study.evaluations
            notes += study.notes
    return {
        "dataset": sources.manifest.dataset,
        "rows": scored.rows,
        "num_seeds": num_seeds,
        "threads": threads,
        "encoder": sources.table.fingerprint,
        **result(models, pairs, studied),
        "notes": notes,
        "seconds": round(time.monotonic() - started, 1),
    }


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
    parser.add_argument("--no-ablations", action="store_true", help="leave out six more trainings")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.ERROR)
    found = measure_all(
        Home(options.home),
        options.dataset,
        num_seeds=options.seeds,
        threads=options.threads,
        tuned=None if options.no_tuning else options.home / "models" / "tuned",
        ablations=not options.no_ablations,
    )
    told = page(found)
    say(told)
    print(write_result("quality", given_command("bench_quality"), found, page=told))


if __name__ == "__main__":
    main()
