"""The domain language model, from the tables to the figures.

One home folder holds everything: corpus, tokenizers, shards, models. What is there already is not
made again, so a benchmark that was killed goes on. Held out is the corpus' test split.

- ``tokens_saved_vs_general``, ``tokens_saved_vs_minilm``: share of the tokens of held-out domain
  text, against a byte-level BPE of the same size trained on general English (the documentation
  strings of Python's standard library), and against MiniLM's WordPiece.
- ``generation_speed_ratio``: characters per second of two models of the same architecture, with
  the domain's and with the general tokenizer, that write the same held-out texts in turn.
- ``extension_saved``, ``extension_longer``, ``extension_used``: the general BPE, extended.
- ``averaging_gain_bits_per_byte``: bits per byte of the best single checkpoint less those of the
  average on the validation split, mean over the seeds; below it each seed's.
- ``bits_per_byte``: of every model and the n-gram baseline, by source, on the test split. The
  average, which is what the commands go on with, is compared with the n-gram baseline; the model
  with the general tokenizer with the one of the same architecture and time, neither averaged.
- ``matmul_share``: of the rate of the model's matrix products alone that pretraining reached.
- ``tasks``: what the tuned model answers, beside simple rules.

    python -m benchmarks.bench_domain_llm
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.bench_tokenizer import (
    check_lengths,
    domain_sources,
    general_tokenizer,
    held_out_parts,
    pooled,
    strings,
)
from benchmarks.results_file import given_command, write_result
from encoders.config import DEFAULT_MODEL
from encoders.devices import open_devices, torch_threads
from encoders.lm.averaging import AveragingSummary, average
from encoders.lm.corpus import CorpusManifest, load_corpus
from encoders.lm.corpus_builder import CorpusConfig, build_corpus
from encoders.lm.evaluation import EvaluationConfig, evaluate_models
from encoders.lm.evaluation_report import write_report
from encoders.lm.extended_folder import extend_tokenizer
from encoders.lm.fertility import measure
from encoders.lm.generation_speed import measure_speeds
from encoders.lm.held_out_documents import draw_documents, texts_to_write
from encoders.lm.instruction_tuning import tune_on_tasks
from encoders.lm.model_folder import load_language_model
from encoders.lm.pretraining import PretrainingSummary, pretrain
from encoders.lm.recipes import RECIPES
from encoders.lm.tokenizer import train_tokenizer
from encoders.lm.tokenizer_config import ExtendConfig, TokenizerConfig
from encoders.lm.tokenizer_folder import read_tokenizer
from encoders.lm.tokenizer_report import reference_tokenizers
from feature_repo.command import say
from feature_repo.dataset import load_dataset
from feature_repo.home import Home, complete_folder
from feature_repo.ingest import ingest
from feature_repo.progress import BarLine, progress_bar

DOMAIN, GENERAL = "domain", "general"
"""The two tokenizers."""
SPEED_ROUNDS = 5
GOAL_SAVED, GOAL_RATIO, GOAL_EXTENDED, GOAL_USED, GOAL_MATMUL = 0.34, 1.34, 0.15, 0.9, 0.4


def prepare(home: Home, dataset: Path) -> CorpusManifest:
    """Tables, corpus and the two tokenizers."""
    with progress_bar("ingest", "steps") as progress:
        ingest(home, load_dataset(dataset), progress=progress)
    with progress_bar("corpus", "documents") as progress:
        build_corpus(home, CorpusConfig(), progress)
    corpus = load_corpus(home)
    with progress_bar("tokenizer", "texts and phrases") as progress:
        own = train_tokenizer(home, TokenizerConfig(name=DOMAIN), progress)
    folder = home.tokenizers / GENERAL
    if not folder.exists():
        with complete_folder(folder) as part:
            general_tokenizer(home, corpus, own.report.vocab_size).save_pretrained(part)
    return corpus


def tokenizer_figures(home: Home, corpus: CorpusManifest, num_strings: int) -> dict[str, Any]:
    """Tokens of held-out text, and what extending the general tokenizer brings."""
    tokenizers = {
        name: read_tokenizer(home.tokenizers / name) for name in (DOMAIN, GENERAL)
    } | reference_tokenizers(corpus.special_tokens)
    parts = held_out_parts(home, corpus)
    headline = [*domain_sources(corpus), "descriptions"]
    found = {
        name: {part: measure(tokenizer, parts[part]) for part in headline}
        for name, tokenizer in tokenizers.items()
    }
    with tempfile.TemporaryDirectory() as scratch:
        with progress_bar("extend", "documents") as progress:
            extended = extend_tokenizer(
                home,
                GENERAL,
                "extended",
                ExtendConfig(),
                folder=Path(scratch) / "extended",
                progress=progress,
            )
        checked = check_lengths(
            tokenizers[GENERAL], read_tokenizer(extended.folder), strings(home, num_strings)
        )
    return {
        "tokens_saved_vs_general": pooled(found[DOMAIN], found[GENERAL], headline),
        "tokens_saved_vs_minilm": pooled(found[DOMAIN], found[DEFAULT_MODEL], headline),
        "extension_saved": extended.report.tokens_saved,
        **checked,
        "extension_used": extended.report.use.texts_used,
        "vocab_size": {name: len(tokenizer) for name, tokenizer in tokenizers.items()},
    }


def learn(
    home: Home, name: str, tokenizer: str, *, seed: int, minutes: float | None, threads: int
) -> PretrainingSummary:
    """Pretrain the tiny recipe, where it is not there."""
    recipe = RECIPES["tiny"]()
    learning = replace(recipe.learning, seed=seed, minutes=minutes or recipe.learning.minutes)
    config = replace(recipe, learning=learning)
    with BarLine() as bars:
        return pretrain(
            home,
            config,
            name=name,
            tokenizer=tokenizer,
            threads=threads,
            reading=bars.bar(f"read for {name}", "bytes"),
            learning=bars.bar(f"pretrain {name}", "steps"),
        )


def speed_figures(home: Home, corpus: CorpusManifest, models: dict[str, Path]) -> dict[str, Any]:
    """Two models write the same held-out texts in turn."""
    drawn = draw_documents(home, corpus, "test", 100_000)
    texts = texts_to_write(drawn, num=9, characters=300)
    loaded = {name: load_language_model(folder) for name, folder in models.items()}
    with progress_bar("speed", "texts") as progress:
        found = measure_speeds(loaded, texts, rounds=SPEED_ROUNDS, progress=progress)
    ratios = [
        slow / fast
        for fast, slow in zip(found[DOMAIN].seconds, found[GENERAL].seconds, strict=True)
    ]
    return {
        "generation_speed_ratio": statistics.median(ratios),
        "generation_speed_ratios": ratios,
        "characters_per_s": {name: speed.characters_per_s for name, speed in found.items()},
        "tokens_per_s_writing": {name: speed.tokens_per_s for name, speed in found.items()},
        "characters_per_token": {n: speed.characters_per_token for n, speed in found.items()},
        "parameters": {name: model.num_parameters() for name, (model, _) in loaded.items()},
    }


def share_of(summary: PretrainingSummary) -> float:
    """Of the matrix products' rate alone; 0 where it was not measured."""
    return summary.manifest.matmul_share or 0.0


def average_kept(home: Home, folder: Path) -> AveragingSummary:
    with progress_bar(f"average {folder.name}", "weights") as progress:
        return average(home, folder, progress=progress)


def measure_all(
    home: Home,
    dataset: Path,
    *,
    num_seeds: int,
    minutes: float | None,
    num_strings: int,
    threads: int,
    report: Path | None,
) -> dict[str, Any]:
    """Make and measure everything.

    Args:
        home: Where everything is kept.
        dataset: Data set file.
        num_seeds: Of the models that are averaged.
        minutes: That each model learns for; None = the recipe's.
        num_strings: On which the extended tokenizer is compared with its base.
        threads: Of the arithmetic.
        report: HTML file of the evaluation, too.
    """
    began = time.perf_counter()
    corpus = prepare(home, dataset)
    tokens = tokenizer_figures(home, corpus, num_strings)
    own = [
        learn(home, f"tiny-{seed}", DOMAIN, seed=seed, minutes=minutes, threads=threads)
        for seed in range(num_seeds)
    ]
    general = learn(home, "tiny-general", GENERAL, seed=0, minutes=minutes, threads=threads)
    with torch_threads(threads):
        averages = [average_kept(home, summary.folder) for summary in own]
        gains = [summary.manifest.gain for summary in averages]
        with progress_bar("tune", "steps") as progress, open_devices(cpu=True) as devices:
            tuned = tune_on_tasks(
                home, averages[0].folder, "tiny-0-tuned", devices=devices, progress=progress
            )
        compared = [averages[0].folder, own[0].folder, tuned.folder, general.folder]
        evaluation = evaluate_models(
            home, compared, EvaluationConfig(), bars=lambda what: progress_bar(what, "parts")
        )
        speed = speed_figures(home, corpus, {DOMAIN: own[0].folder, GENERAL: general.folder})
    if report is not None:
        write_report(report, evaluation)
    bits = {
        model.name: {name: found.value for name, found in model.bits_per_byte.items()}
        for model in evaluation.models
    }
    averaged, single, ngram = (evaluation.models[place].name for place in (0, 1, -1))
    figures = {
        **tokens,
        **speed,
        "averaging_gain_bits_per_byte": statistics.fmean(gains),
        "averaging_gains": gains,
        "bits_per_byte": bits,
        "bits_per_byte_less_first": {
            model.name: {
                name: [found.difference, found.difference_low, found.difference_high]
                for name, found in model.bits_per_byte.items()
            }
            for model in evaluation.models[1:]
        },
        "tasks": {
            task: {
                "examples": found.model.num,
                "exact": found.model.exact,
                "exact_interval": [found.model.low, found.model.high],
                "word_f1": found.model.word_f1,
                "rules": {rule: one.exact for rule, one in found.rules.items()},
                "rules_word_f1": {rule: one.word_f1 for rule, one in found.rules.items()},
            }
            for task, found in evaluation.models[2].tasks.items()
        },
        "pretraining": {
            summary.folder.name: {
                "steps": summary.manifest.steps,
                "tokens": summary.manifest.num_tokens,
                "seconds": summary.manifest.seconds,
                "tokens_per_s": summary.manifest.tokens_per_s,
                "matmul_share": summary.manifest.matmul_share,
                "parameters": summary.manifest.num_parameters,
            }
            for summary in (*own, general)
        },
        "matmul_share": min(share_of(summary) for summary in own),
        "corpus_bytes": {
            name: {split: size.bytes for split, size in source.splits.items()}
            for name, source in corpus.sources.items()
        },
        "num_seeds": num_seeds,
        "minutes": own[0].manifest.config["learning"]["minutes"],
        "threads": threads,
        "seconds_this_run": round(time.perf_counter() - began, 1),
    }
    figures["reached"] = {
        "tokens_saved": min(tokens["tokens_saved_vs_general"], tokens["tokens_saved_vs_minilm"])
        >= GOAL_SAVED,
        "generation_speed": speed["generation_speed_ratio"] >= GOAL_RATIO,
        "extension_saved": tokens["extension_saved"] >= GOAL_EXTENDED,
        "extension_none_longer": tokens["extension_longer"] == 0,
        "extension_used": tokens["extension_used"] >= GOAL_USED,
        "averaging": min(gains) > 0,
        "better_than_ngram": bits[averaged]["domain"] < bits[ngram]["domain"],
        "better_than_general_tokenizer": bits[single]["domain"]
        < bits[general.folder.name]["domain"],
        "matmul_share": figures["matmul_share"] >= GOAL_MATMUL,
    }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset", type=Path, default=Path("feature_repo/datasets/online_retail.toml")
    )
    parser.add_argument("--home", type=Path, default=Path("var/domain-llm"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--minutes", type=float, help="that each model learns for [default: the recipe's]"
    )
    parser.add_argument("--strings", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report", type=Path, help="HTML file of the evaluation")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.ERROR)
    figures = measure_all(
        Home(options.home),
        options.dataset,
        num_seeds=options.seeds,
        minutes=options.minutes,
        num_strings=options.strings,
        threads=options.threads,
        report=options.report,
    )
    for goal, reached in figures["reached"].items():
        say(f"{goal}: {'reached' if reached else 'MISSED'}")
    print(write_result("domain_llm", given_command("bench_domain_llm"), figures))


if __name__ == "__main__":
    main()
