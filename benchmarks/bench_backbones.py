"""Which language model should BAHE split? The same recipe on the vectors and layers of each.

- ``minilm``: all-MiniLM-L6-v2 as it comes.
- ``minilm_tuned``: the same, tuned on which behaviours go together (``longtrail tune``).
- ``domain_llm``: a language model made from the data set alone (``longtrail lm ...``).
- ``domain_llm_tuned``: that one, tuned likewise.

One home folder holds everything: features, one set of vectors per backbone, one run per backbone
and seed. What is there already is not made again, so a benchmark that was killed goes on. Figures
are means over the seeds; every backbone is compared with ``minilm`` on the same test rows, users
drawn with replacement.

The domain language model has read the baskets up to the validation period, those of the training
requests among them; ``seen_labels`` says of how many requests each backbone has seen the outcome.
Of the test period none has seen anything.

    python -m benchmarks.bench_backbones --model var/lm/models/tiny-average
"""

import argparse
import logging
import time
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.quality_plan import Seeded, train_missing
from benchmarks.quality_result import compared, figures
from benchmarks.results_file import given_command, write_result
from encoders.config import EncoderConfig, TuningConfig
from encoders.devices import torch_threads
from encoders.encode import EncodeSummary, encode_behaviors
from encoders.lm.records import LISTING, TITLE
from encoders.tuning import MANIFEST_FILE as TUNING_FILE
from encoders.tuning import TuningManifest, tune
from encoders.tuning_period import seen_labels
from feature_repo.cli import build_features
from feature_repo.command import Settings, say
from feature_repo.dataset import load_dataset
from feature_repo.home import Home
from feature_repo.ingest import ingest
from feature_repo.manifest import load_manifest
from feature_repo.materialize import apply
from feature_repo.progress import late_bar, progress_bar
from training.evaluate import measure, score_runs
from training.recipes import RECIPES
from training.sources import Sources

FIRST = "minilm"
"""What the others are compared with."""
AS_LEARNED = f"{LISTING}{TITLE}{{text}}"
"""Prompt of the domain language model: how it has read titles."""


def backbones(home: Home, model: Path) -> dict[str, EncoderConfig]:
    """The encoders, tuned ones made where they are not there.

    Args:
        home: Ingest has been run.
        model: Folder of the domain language model.
    """
    plain = {
        FIRST: EncoderConfig(),
        "domain_llm": EncoderConfig(model=str(model), prompt=AS_LEARNED),
    }
    found = {}
    for name, config in plain.items():
        folder = home.root / "models" / f"{name}-tuned"
        if not folder.exists():
            with progress_bar(f"tune {name}", "steps") as progress:
                tune(home, TuningConfig(encoder=config), folder, progress=progress)
        found[name] = config
        found[f"{name}_tuned"] = replace(config, model=str(folder))
    return found


def encode_all(home: Home, configs: dict[str, EncoderConfig]) -> dict[str, EncodeSummary]:
    """Vectors of every backbone; the first one's are made current again."""
    found = {}
    for name, config in configs.items():
        with progress_bar(f"encode {name}", "texts") as progress:
            found[name] = encode_behaviors(home, config, progress)
    encode_behaviors(home, configs[FIRST])
    return found


def seen(home: Home, configs: dict[str, EncoderConfig]) -> dict[str, dict[str, int]]:
    """Split -> requests whose outcome a backbone has seen."""
    valid = load_manifest(home).split.valid
    result: dict[str, dict[str, int]] = {}
    for name, config in configs.items():
        tuned = Path(config.model) / TUNING_FILE
        found: dict[str, int] = {}
        if tuned.is_file():
            found = TuningManifest.load(tuned, made_by="longtrail tune").seen_labels
        result[name] = found if name.startswith(FIRST) else seen_labels(home, valid)
    return result


def measure_all(
    home: Home, dataset: Path, model: Path, *, recipe: str, num_seeds: int, threads: int
) -> dict[str, Any]:
    """Encode, train, score and compare.

    Args:
        home: Where everything is kept.
        dataset: Data set file.
        model: Folder of the domain language model.
        recipe: Of :data:`training.recipes.RECIPES`.
        num_seeds: Runs per backbone.
        threads: Of the arithmetic.
    """
    began = time.perf_counter()
    started = time.monotonic()
    settings = Settings(home, "embedded")
    with progress_bar("ingest", "steps") as progress:
        ingest(home, load_dataset(dataset), progress=progress)
    with torch_threads(threads):
        configs = backbones(home, model)
        encoded = encode_all(home, configs)
        build_features(settings)
        apply(home, settings.profile)
        sources = Sources.open(home, settings.profile)
        plain = replace(RECIPES[recipe](), baseline=True)
        plan: dict[str, Seeded] = {
            name: [
                (
                    replace(plain, training=replace(plain.training, seed=seed)),
                    f"backbones-{name}-{recipe}-seed{seed}",
                )
                for seed in range(num_seeds)
            ]
            for name in configs
        }
        for name, runs in plan.items():
            fingerprint = encoded[name].manifest.fingerprint
            train_missing(sources.with_encoder(fingerprint), runs, threads)
        of = {name: [run for _, run in runs] for name, runs in plan.items()}
        with ExitStack() as stack:
            scored = score_runs(
                sources,
                [run for runs in of.values() for run in runs],
                reading=late_bar(stack, "read features", "impressions"),
                scoring=late_bar(stack, "score", "impressions"),
            )
        found = {
            name: measure(
                scored, names, against=() if name == FIRST else of[FIRST], started=started
            )
            for name, names in of.items()
        }
    return {
        "dataset": sources.manifest.dataset,
        "rows": scored.rows,
        "recipe": recipe,
        "num_seeds": num_seeds,
        "threads": threads,
        "models": {name: figures(evaluation) for name, evaluation in found.items()},
        f"against_{FIRST}": {
            name: compared(evaluation) for name, evaluation in found.items() if name != FIRST
        },
        "encoders": {
            name: {
                "fingerprint": summary.manifest.fingerprint,
                "split_layer": summary.manifest.split_layer,
                "width": summary.manifest.width,
                "prompt": summary.manifest.prompt,
            }
            for name, summary in encoded.items()
        },
        "seen_labels": seen(home, configs),
        "notes": scored.notes,
        "seconds": round(time.perf_counter() - began, 1),
    }


def table(result: dict[str, Any]) -> str:
    """The backbones as a table for people."""
    lines = [f"{'backbone':<20}{'AUC':>8}  {'95 % interval':<18}{'against ' + FIRST:<28}"]
    for name, values in result["models"].items():
        interval = f"[{values['auc_low']:.4f}, {values['auc_high']:.4f}]"
        line = f"{name:<20}{values['auc']:8.4f}  {interval:<18}"
        if name != FIRST:
            auc = result[f"against_{FIRST}"][name]["all"]["auc"]
            line += f"{auc['difference']:+.4f} [{auc['low']:+.4f}, {auc['high']:+.4f}]"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset", type=Path, default=Path("feature_repo/datasets/online_retail.toml")
    )
    parser.add_argument("--home", type=Path, default=Path("var/backbones"))
    parser.add_argument(
        "--model", type=Path, required=True, help="folder of the domain language model"
    )
    parser.add_argument("--recipe", default="bahe_base", choices=sorted(RECIPES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.ERROR)
    result = measure_all(
        Home(options.home),
        options.dataset,
        options.model,
        recipe=options.recipe,
        num_seeds=options.seeds,
        threads=options.threads,
    )
    say(table(result))
    print(write_result("backbones", given_command("bench_backbones"), result))


if __name__ == "__main__":
    main()
