"""Which language model should BAHE split? The same recipe on the vectors and layers of each.

- ``minilm``: all-MiniLM-L6-v2 as it comes.
- ``minilm_tuned``: the same, tuned on which behaviours go together (``longtrail tune``).
- ``domain_llm``: a language model made from the data set alone (``longtrail lm ...``).
- ``domain_llm_tuned``: that one, tuned likewise.

One home folder holds everything: features, one set of vectors per backbone, one run per backbone
and seed. What is there already is not made again, so a benchmark that was killed goes on.

``backbones`` holds of each

- ``auc`` with ``auc_low`` and ``auc_high``: of the test rows, mean over the seeds, with the 95 %
  interval of users drawn with replacement; ``models`` has all other figures, and the slices,
- ``auc_difference`` with its interval: less ``minilm``'s on the same rows and the same draws of
  users; ``against_minilm`` has those of all other figures,
- ``num_parameters_shallow`` (embeddings, and the layers up to the split) and
  ``num_parameters_deep`` (of the layers above it those that the recipe takes),
- ``encode_seconds``, ``encode_texts_per_s``: of the shallow half on the same texts
  (``num_encoded_texts``), tokenizer included, loading not,
- ``seen_labels``: split -> impressions whose outcome the backbone may have read. The domain
  language model has read the baskets up to the validation period, those of the training requests
  among them. Of the test period none has seen anything.

    python -m benchmarks.bench_backbones --model var/lm/models/tiny-average
"""

import argparse
import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.quality_plan import Seeded, score_all, train_missing
from benchmarks.quality_result import Compared, compared, figures
from benchmarks.quality_tables import with_interval
from benchmarks.results_file import given_command, markdown_table, write_result
from encoders.config import EncoderConfig, TuningConfig
from encoders.devices import torch_threads
from encoders.encode import encode_behaviors
from encoders.fingerprint import model_fingerprint
from encoders.lm.records import LISTING, TITLE
from encoders.pretrained import find_model_folder
from encoders.split import load_deep_half
from encoders.text_encoder import TextEncoder
from encoders.tuning import MANIFEST_FILE as TUNING_FILE
from encoders.tuning import TuningManifest, tune
from encoders.tuning_period import seen_labels
from feature_repo.cli import build_features
from feature_repo.command import Settings, say
from feature_repo.dataset import LoadedDataSet, load_dataset
from feature_repo.errors import EncoderError
from feature_repo.home import Home
from feature_repo.ingest import ingest
from feature_repo.manifest import EncoderManifest, load_manifest
from feature_repo.materialize import apply
from feature_repo.progress import progress_bar
from training.config import BaheConfig
from training.evaluate import measure
from training.recipes import RECIPES, Recipe
from training.sources import Sources

FIRST = "minilm"
"""What the others are compared with."""
AS_LEARNED = f"{LISTING}{TITLE}{{text}}"
"""Prompt of the domain language model: how it has read titles."""


ENCODED_TEXTS = 2000
"""Texts whose encoding is timed."""
RECIPE_NAMES = sorted(n for n, recipe in RECIPES.items() if isinstance(recipe().model, BaheConfig))
"""Recipes that split a language model."""


def plain_backbones(model: Path) -> dict[str, EncoderConfig]:
    """The encoders before tuning.

    Args:
        model: Folder of the domain language model.
    """
    return {
        FIRST: EncoderConfig(),
        "domain_llm": EncoderConfig(model=str(model), prompt=AS_LEARNED),
    }


def with_tuned(
    home: Home, plain: Mapping[str, EncoderConfig], tuning: TuningConfig
) -> dict[str, EncoderConfig]:
    """Each encoder and what tuning makes of it, tuned where that is not there.

    Args:
        home: Ingest has been run.
        plain: Name -> encoder.
        tuning: How; its encoder is replaced.

    Raises:
        EncoderError: If a tuned one is there, but of another model, other data or settings.
    """
    found = {}
    for name, config in plain.items():
        folder = home.root / "models" / f"{name}-tuned"
        if folder.exists():
            _check_tuned(home, folder, replace(tuning, encoder=config))
        else:
            with progress_bar(f"tune {name}", "steps") as progress:
                tune(home, replace(tuning, encoder=config), folder, progress=progress)
        found[name] = config
        found[f"{name}_tuned"] = replace(config, model=str(folder))
    return found


def _check_tuned(home: Home, folder: Path, config: TuningConfig) -> None:
    made = _tuning_of(folder)
    model = config.encoder.model
    expected = (
        model_fingerprint(find_model_folder(model)),
        load_manifest(home).source_fingerprint,
        config.steps,
    )
    if (made.base_model_fingerprint, made.source_fingerprint, made.steps) != expected:
        raise EncoderError(
            f"{folder} was not tuned from {model} on this home's data for {config.steps} steps: "
            "delete it, or give another --home"
        )


def _tuning_of(folder: Path) -> TuningManifest:
    return TuningManifest.load(folder / TUNING_FILE, made_by="longtrail tune")


def encode_all(home: Home, configs: Mapping[str, EncoderConfig]) -> dict[str, EncoderManifest]:
    """Vectors of every backbone; the first one's are made current again."""
    found = {}
    for name, config in configs.items():
        with progress_bar(f"encode {name}", "texts") as progress:
            found[name] = encode_behaviors(home, config, progress).manifest
    encode_behaviors(home, configs[FIRST])
    return found


def cost(home: Home, encoder: EncoderManifest, recipe: Recipe) -> dict[str, Any]:
    """Weights of both halves, and seconds to encode texts, measured anew each time."""
    shallow = TextEncoder.load(encoder)
    layers = getattr(recipe.model, "num_deep_layers", None)
    deep = load_deep_half(encoder.model, encoder.split_layer, num_layers=layers)
    texts = pq.read_table(home.behaviors, columns=["text"])["text"].slice(0, ENCODED_TEXTS)
    began = time.perf_counter()
    shallow.encode(texts.to_pylist())
    seconds = time.perf_counter() - began
    return {
        "num_parameters_shallow": sum(p.numel() for p in shallow.half.parameters()),
        "num_parameters_deep": sum(p.numel() for p in deep.parameters()),
        "encode_seconds": round(seconds, 3),
        "encode_texts_per_s": round(len(texts) / seconds, 1),
        "num_encoded_texts": len(texts),
    }


def labels_seen(home: Home, name: str, config: EncoderConfig) -> dict[str, int]:
    """Split -> impressions whose outcome a backbone may have read."""
    if not name.startswith(FIRST):
        return seen_labels(home, load_manifest(home).split.valid)
    folder = Path(config.model)
    return _tuning_of(folder).seen_labels if (folder / TUNING_FILE).is_file() else {}


def measure_all(
    home: Home,
    dataset: LoadedDataSet,
    plain: Mapping[str, EncoderConfig],
    recipe: Recipe,
    tuning: TuningConfig,
    *,
    num_seeds: int,
    threads: int,
) -> dict[str, Any]:
    """Encode, train, score and compare.

    Args:
        home: Where everything is kept.
        dataset: What is learned from.
        plain: Name -> encoder before tuning; :data:`FIRST` is one of them.
        recipe: Trained on each.
        tuning: How the tuned ones are made.
        num_seeds: Runs per backbone.
        threads: Of the arithmetic.
    """
    began = time.perf_counter()
    started = time.monotonic()
    settings = Settings(home, "embedded")
    with progress_bar("ingest", "steps") as progress:
        ingest(home, dataset, progress=progress)
    with torch_threads(threads):
        configs = with_tuned(home, plain, tuning)
        encoders = encode_all(home, configs)
        build_features(settings)
        apply(home, settings.profile)
        sources = Sources.open(home, settings.profile)
        recipe = replace(recipe, baseline=True)
        plan: dict[str, Seeded] = {
            name: [
                (
                    replace(recipe, training=replace(recipe.training, seed=seed)),
                    f"backbones-{name}-{recipe.name}-seed{seed}",
                )
                for seed in range(num_seeds)
            ]
            for name in configs
        }
        for name, runs in plan.items():
            train_missing(sources.with_encoder(encoders[name].fingerprint), runs, threads)
        of = {name: [run for _, run in runs] for name, runs in plan.items()}
        scored = score_all(sources, of)
        found = {
            name: measure(
                scored, names, against=() if name == FIRST else of[FIRST], started=started
            )
            for name, names in of.items()
        }
        costs = {name: cost(home, encoder, recipe) for name, encoder in encoders.items()}
    models = {name: figures(evaluation) for name, evaluation in found.items()}
    against = {name: compared(one) for name, one in found.items() if name != FIRST}
    return {
        "dataset": sources.manifest.dataset,
        "rows": scored.rows,
        "recipe": recipe.name,
        "num_seeds": num_seeds,
        "threads": threads,
        "backbones": {
            name: {
                **{key: models[name][key] for key in ("auc", "auc_low", "auc_high")},
                **_difference(against.get(name)),
                **costs[name],
                "seen_labels": labels_seen(home, name, config),
                "fingerprint": encoders[name].fingerprint,
                "split_layer": encoders[name].split_layer,
                "width": encoders[name].width,
                "prompt": encoders[name].prompt,
            }
            for name, config in configs.items()
        },
        "models": models,
        f"against_{FIRST}": against,
        "notes": scored.notes,
        "seconds": round(time.perf_counter() - began, 1),
    }


def _difference(against: Compared | None) -> dict[str, float | None]:
    """What a backbone's AUC has above the first one's; None = it is the first one."""
    if against is None:
        return {}
    auc = against["all"]["auc"]
    return {
        "auc_difference": auc["difference"],
        "auc_difference_low": auc["low"],
        "auc_difference_high": auc["high"],
    }


def table(result: Mapping[str, Any]) -> str:
    """The backbones as a table for people, in Markdown.

    Args:
        result: Of :func:`measure_all`.
    """
    head = [
        "Backbone",
        "AUC [95 %]",
        f"less {FIRST}'s",
        "Weights below and above the split",
        "Texts/s",
        "Labels seen",
    ]
    rows = []
    for name, one in result["backbones"].items():
        seen = ", ".join(f"{number:,} {split}" for split, number in one["seen_labels"].items())
        less_first = with_interval(*_bounds(one, "auc_difference"), signed=True)
        rows.append(
            [
                name,
                with_interval(*_bounds(one, "auc")),
                "" if name == FIRST else less_first,
                f"{one['num_parameters_shallow']:,} and {one['num_parameters_deep']:,}",
                f"{one['encode_texts_per_s']:,.0f}",
                seen or "none",
            ]
        )
    return markdown_table(head, rows)


def _bounds(values: Mapping[str, Any], name: str) -> Iterator[float | None]:
    return (values.get(f"{name}{end}") for end in ("", "_low", "_high"))


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
    parser.add_argument("--recipe", default="bahe_base", choices=RECIPE_NAMES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--tuning-steps", type=int, default=TuningConfig.steps, help="of the tuned ones"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.ERROR)
    result = measure_all(
        Home(options.home),
        load_dataset(options.dataset),
        plain_backbones(options.model),
        RECIPES[options.recipe](),
        TuningConfig(steps=options.tuning_steps),
        num_seeds=options.seeds,
        threads=options.threads,
    )
    page = table(result)
    say(page)
    print(write_result("backbones", given_command("bench_backbones"), result, page=page))


if __name__ == "__main__":
    main()
