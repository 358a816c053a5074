"""Is BAHE as good as the language model over the full text? The paper's comparison, of quality.

All have the same numbers beside the texts, the same training rows (the given ones) and one pass:

- ``bahe_same_budget``: the recipe ``bahe_base``, its language model cut in two.
- ``bahe_same_steps``: that with as many contexts per step as the next, so as many steps. In one
  pass over few rows, larger batches leave the head with too few.
- ``full_text_numeric``: the whole language model over the last 256 tokens of the history, learning
  end to end.

What each costs is :mod:`benchmarks.bench_bahe_vs_full_text`'s. On two cores the whole language
model takes hours; ``--context-share`` lets all learn from the same part of the requests. What is
there already is not made again, so a benchmark that was killed goes on; the home folder is that of
``bench_quality``.

    python -m benchmarks.bench_full_text_quality
"""

import argparse
import logging
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality_home import prepare
from benchmarks.quality_plan import (
    SAME_BUDGET,
    SINGLE,
    Seeded,
    once,
    one_pass,
    score_all,
    train_missing,
)
from benchmarks.quality_result import compared, figures
from benchmarks.quality_tables import bullets, difference_tables, models_table
from benchmarks.results_file import given_command, write_result
from encoders.devices import torch_threads
from feature_repo.command import say
from feature_repo.home import Home
from training.evaluate import measure
from training.sources import Sources

SAME_STEPS = "bahe_same_steps"
FULL_TEXT = "full_text_numeric"


def planned(context_share: float) -> dict[str, Seeded]:
    """The models and their runs, the full text last.

    Args:
        context_share: Of the given training rows' contexts; all learn from the same.
    """
    part = f"training.context_share={context_share}"
    whole = one_pass("full_text", "model.use_numeric=true", part)
    batch = f"training.batch_contexts={whole.training.batch_contexts}"
    recipes = {
        SAME_BUDGET: one_pass(SINGLE, part),
        SAME_STEPS: one_pass(SINGLE, part, batch),
        FULL_TEXT: whole,
    }
    suffix = "" if context_share == 1 else f"-share{context_share}"
    return {name: [once(recipe, name + suffix)] for name, recipe in recipes.items()}


def compare(sources: Sources, plan: Mapping[str, Seeded], threads: int) -> dict[str, Any]:
    """Train what is missing, score and compare.

    Args:
        sources: What to read from.
        plan: Of :func:`planned`.
        threads: Of the arithmetic.

    Raises:
        ArtifactError: If a run of such a name is of other settings, data or vectors.
    """
    started = time.monotonic()
    of = {name: [run for _, run in runs] for name, runs in plan.items()}
    with torch_threads(threads):
        for runs in plan.values():
            train_missing(sources, runs, threads)
        scored = score_all(sources, of)
    *others, rival = plan
    return {
        "dataset": sources.manifest.dataset,
        "rows": scored.rows,
        "threads": threads,
        "training": {
            name: {
                "context_share": recipe.training.context_share,
                "batch_contexts": recipe.training.batch_contexts,
                "num_steps": scored.manifests[run].config["validations"][-1]["step"],
            }
            for name, [(recipe, run)] in plan.items()
        },
        "encoder": sources.table.fingerprint,
        "rival": rival,
        "differences": {
            name: compared(measure(scored, of[name], against=of[rival], started=started))
            for name in others
        },
        "models": {
            name: figures(measure(scored, runs, started=started)) for name, runs in of.items()
        },
        "notes": scored.notes,
        "seconds": round(time.monotonic() - started, 1),
    }


def page(found: Mapping[str, Any]) -> str:
    """The result as Markdown.

    Args:
        found: Of :func:`compare`.
    """
    differences = {
        f"`{name}` - `{found['rival']}`": by_slice
        for name, by_slice in found["differences"].items()
    }
    [share] = {training["context_share"] for training in found["training"].values()}
    steps = ", ".join(
        f"`{name}` in {training['num_steps']:,} steps of {training['batch_contexts']} contexts"
        for name, training in found["training"].items()
    )
    part = "all" if share == 1 else f"{share:.0%} of the"
    caption = (
        f"{found['dataset']}, {found['rows']} rows, learned from {part} given training requests "
        f"({steps}), vectors of encoder `{found['encoder']}`, one seed each. 95 % intervals by "
        "bootstrap over users, those of differences on the same draws; a difference of logloss "
        "below 0 is better."
    )
    parts = [caption, models_table(found["models"]), *difference_tables(differences)]
    return "\n\n".join([*parts, *bullets(found["notes"])])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset", type=Path, default=Path("feature_repo/datasets/online_retail.toml")
    )
    parser.add_argument("--home", type=Path, default=Path("var/quality"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--context-share", type=float, default=1.0, help="of the training requests' contexts"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.ERROR)
    home = Home(options.home)
    settings = prepare(home, options.dataset, tuned=options.home / "models" / "tuned")
    found = compare(
        Sources.open(home, settings.profile), planned(options.context_share), options.threads
    )
    told = page(found)
    say(told)
    command = given_command("bench_full_text_quality")
    print(write_result("full_text_quality", command, found, page=told))


if __name__ == "__main__":
    main()
