"""Does the trainable deep half pay, and if not, why? One recipe, one budget, one change each.

Every variant is compared with the recipe whose deep half keeps its pretrained weights (``frozen``),
on the same test rows, users drawn with replacement:

- ``without``: pooled vectors in place of the deep half; ``trained``: the recipe as it is;
- ``rate_0.1`` to ``rate_3``: the deep half's highest learning rate, as a part of the head's;
- ``layers_1`` to ``layers_3``: its depth, as far as layers lie above the split (deeper ones need
  other vectors: ``longtrail encode --split-layer``); ``..._top_1``: the deepest, its highest layer
  alone learns;
- ``without_next_behavior``: no auxiliary loss; ``over_states``: target attention over the deep
  half's states in place of the frozen vectors; ``without_position``; ``without_age`` (of kernels
  and attention, too).

A change that helps a frozen deep half as well says nothing for training it: so each variant of the
last two kinds has a twin whose deep half is frozen (``..._frozen``), and is compared with that as
well. ``valid_auc`` is there to choose by; the test rows only tell what the choice is worth.

Runs that are there are not trained again, a killed one goes on. The result holds every variant
whose runs are there, whatever ``--only`` says, and names those that are missing: after a kill,
``--only frozen`` writes what there is.

    python -m benchmarks.bench_deep_half --only trained without
"""

import argparse
import logging
import time
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.deep_half_plan import REFERENCE, Variant, recipes, seeded, variants
from benchmarks.quality_home import prepare
from benchmarks.quality_plan import SAME_BUDGET, score_all, train_missing
from benchmarks.quality_result import Compared, compared, figures
from benchmarks.quality_tables import bullets, differences_table, models_table
from benchmarks.results_file import given_command, markdown_table, write_result
from encoders.devices import torch_threads
from encoders.layout import layer_stack
from feature_repo.command import say
from feature_repo.errors import LongtrailError
from feature_repo.home import Home
from training.ablations import already_trained
from training.evaluate import ScoredRows, measure
from training.recipes import Recipe
from training.sources import Sources


def study(
    sources: Sources, recipe: Recipe, *, only: Collection[str] = (), num_seeds: int, threads: int
) -> dict[str, Any]:
    """Train what is asked for, then score and compare all that is there.

    Args:
        sources: What to read from.
        recipe: One of :func:`benchmarks.deep_half_plan.recipes`.
        only: Variants to train beside the reference; empty = all.
        num_seeds: Runs per variant.
        threads: Of the arithmetic.

    Raises:
        LongtrailError: If there is no such variant, or a run of such a name is of other settings.
    """
    started = time.monotonic()
    num_layers = count_layers(sources)
    found, notes = variants(recipe, num_layers=num_layers)
    if unknown := sorted(set(only) - found.keys()):
        raise LongtrailError(
            f"--only takes {', '.join(found)}, got {', '.join(unknown)}"
            + "".join(f"; {note}" for note in notes)
        )
    plan = {
        name: seeded(name, variant, recipe, num_seeds=num_seeds) for name, variant in found.items()
    }
    wanted = {REFERENCE, *(only or found)}
    with torch_threads(threads):
        train_missing(
            sources, [pair for name in found if name in wanted for pair in plan[name]], threads
        )
        of = {
            name: [run for _, run in runs]
            for name, runs in plan.items()
            if all(already_trained(sources, *pair) for pair in runs)
        }
        scored = score_all(sources, of)
    return {
        "dataset": sources.manifest.dataset,
        "rows": scored.rows,
        "recipe": recipe.name,
        "num_seeds": num_seeds,
        "threads": threads,
        "encoder": sources.table.fingerprint,
        "num_layers_above_split": num_layers,
        "variants": compare_variants(scored, found, of),
        "missing": [name for name in found if name not in of],
        "notes": [*notes, *scored.notes],
        "seconds": round(time.monotonic() - started, 1),
    }


def count_layers(sources: Sources) -> int:
    """How many layers lie above the split of the vectors that are read."""
    deep_half: Any = sources.deep_half(None)
    return len(layer_stack(deep_half.model))


def compare_variants(
    scored: ScoredRows, found: Mapping[str, Variant], of: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Figures of every variant, compared with the reference and with its frozen twin.

    Args:
        scored: All runs of ``of``.
        found: Name -> variant.
        of: Name of a variant -> its runs; those that are left out are not there.
    """
    started = time.monotonic()
    told = {}
    for name, runs in of.items():
        rivals = dict.fromkeys((REFERENCE, found[name].frozen))
        told[name] = {
            "settings": list(found[name].settings),
            "valid_auc": fmean(scored.manifests[run].metrics["valid"]["auc"] for run in runs),
            **figures(measure(scored, runs, started=started)),
            "against": {
                rival: compared(measure(scored, runs, against=of[rival], started=started))
                for rival in rivals
                if rival in of and rival != name
            },
        }
    return told


def page(found: dict[str, Any]) -> str:
    """The result as Markdown.

    Args:
        found: Of :func:`study`.
    """
    variants = found["variants"]
    settings = [
        [f"`{name}`", ", ".join(f"`{s}`" for s in values["settings"]), f"{values['valid_auc']:.4f}"]
        for name, values in variants.items()
    ]
    differences: dict[str, Compared] = {}
    for reference_only in (True, False):
        for name, values in variants.items():
            for rival, differing in values["against"].items():
                if (rival == REFERENCE) == reference_only:
                    differences[f"`{name}` - `{rival}`"] = differing
    caption = (
        f"Recipe `{found['recipe']}` on {found['dataset']}, {found['rows']} rows, seeds per "
        f"variant: {found['num_seeds']}; {found['num_layers_above_split']} layers lie above the "
        "split. 95 % intervals by bootstrap over users, those of differences on the same draws."
    )
    parts = [
        caption,
        differences_table(differences),
        models_table(variants),
        markdown_table(["Variant", "Settings", "AUC, validation rows"], settings),
        *bullets(found["notes"]),
    ]
    if found["missing"]:
        parts.append(f"Not trained: {', '.join(f'`{name}`' for name in found['missing'])}.")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset", type=Path, default=Path("feature_repo/datasets/online_retail.toml")
    )
    parser.add_argument(
        "--home", type=Path, default=Path("var/quality"), help="that of bench_quality serves both"
    )
    parser.add_argument(
        "--recipe",
        choices=list(recipes()),
        default=SAME_BUDGET,
        help=f"{SAME_BUDGET}: bahe_base in one pass over the given rows (default)",
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help="variants to train")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-tuning", action="store_true", help="plain vectors only")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.ERROR)
    home = Home(options.home)
    tuned = None if options.no_tuning else options.home / "models" / "tuned"
    settings = prepare(home, options.dataset, tuned=tuned)
    try:
        found = study(
            Sources.open(home, settings.profile),
            recipes()[options.recipe],
            only=options.only,
            num_seeds=options.seeds,
            threads=options.threads,
        )
    except LongtrailError as error:
        parser.error(str(error))
    told = page(found)
    say(told)
    print(write_result("deep_half", given_command("bench_deep_half"), found, page=told))


if __name__ == "__main__":
    main()
