"""Tokens of held-out domain text: the own tokenizer, the extended one, and those they are beside.

The domain tokenizer is the one that ``longtrail lm tokenizer`` makes of the home's corpus. Beside
it are MiniLM's WordPiece and a byte-level BPE of the same size with GPT-2's pre-tokenizer, trained
on the documentation strings of Python's standard library; that BPE is also what is extended. All
know the records' special tokens. Held out is the corpus' test split, at most 1 MB of each source,
and the descriptions that were sold in it: all of them, and those never seen before it.

- ``tokens_saved_vs_minilm``, ``tokens_saved_vs_general``: over listings, baskets, histories and
  descriptions together, each with its natural share of that sample; by part in ``saved_by_part``.
- ``extension_saved``: share of the tokens of the domain's field texts, against the base;
  ``extension_longer``: of the strings, half random Unicode and half real text, how many became
  longer (or decode otherwise); ``extension_used``: share of held-out fields holding an appended
  token's string in which one is used, and ``extension_used_pairs`` of all such pairs.

    python -m benchmarks.bench_tokenizer
"""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.results_file import given_command, write_result
from encoders.config import DEFAULT_MODEL
from encoders.lm.built_in_sources import PYTHON_DOCS
from encoders.lm.cli_corpus import corpus_must_be
from encoders.lm.corpus import CorpusManifest, load_corpus, read_documents
from encoders.lm.extended_folder import extend_tokenizer
from encoders.lm.fertility import Fertility, measure, token_ids, tokens_saved
from encoders.lm.tokenizer import train_tokenizer, wrap
from encoders.lm.tokenizer_config import ExtendConfig, TokenizerConfig
from encoders.lm.tokenizer_folder import read_tokenizer
from encoders.lm.tokenizer_report import held_out_texts, reference_tokenizers
from feature_repo.dataset import DATASETS, load_dataset
from feature_repo.home import Home
from feature_repo.ingest import ingest
from feature_repo.manifest import load_manifest
from feature_repo.progress import progress_bar
from feature_repo.query_engine import query_engine

BATCH = 1000
GENERAL, DOMAIN = "general", "domain"
LONGEST_RANDOM = 60
PLANES = ((0x20, 0x7F), (0x0, 0x20), (0xA0, 0x250), (0x370, 0x2000), (0x2000, 0xD800),
          (0xE000, 0x10000), (0x10000, 0x110000))  # fmt: skip
"""Code points that random strings are drawn from; surrogates are no text."""
DESCRIPTIONS = """
SELECT text, min(event_timestamp) >= $test AS is_new, count(*) FILTER (event_timestamp >= $test)
FROM read_parquet($events) JOIN read_parquet($behaviors) USING (behavior_id)
GROUP BY text HAVING max(event_timestamp) >= $test ORDER BY text
"""


def main(home_folder: Path | None, num_strings: int, write: bool) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        home = Home(home_folder or Path(scratch) / "home")
        if not home.manifest.exists():
            with progress_bar("ingest", "steps") as progress:
                ingest(home, load_dataset(DATASETS / "online_retail.toml"), progress=progress)
        corpus_must_be(home)
        corpus = load_corpus(home)
        with progress_bar("tokenizer", "texts") as progress:
            domain = train_tokenizer(home, TokenizerConfig(), progress)
        base = Path(scratch) / "base"
        general = general_tokenizer(home, corpus, domain.report.vocab_size)
        general.save_pretrained(base)
        with progress_bar("extend", "documents") as progress:
            extended = extend_tokenizer(
                home, str(base), "bench", ExtendConfig(), folder=Path(scratch) / "extended",
                progress=progress,
            )  # fmt: skip
        tokenizers = {
            DOMAIN: read_tokenizer(domain.folder),
            GENERAL: general,
            **reference_tokenizers(corpus.special_tokens),
        }
        parts = held_out_parts(home, corpus)
        found = {
            name: {part: measure(tokenizer, texts) for part, texts in parts.items()}
            for name, tokenizer in tokenizers.items()
        }
        checked = check_lengths(
            read_tokenizer(base), read_tokenizer(extended.folder), strings(home, num_strings)
        )
    saved = {
        name: {part: tokens_saved(found[DOMAIN][part], figures[part]) for part in parts}
        for name, figures in found.items()
        if name != DOMAIN
    }
    headline = [*domain_sources(corpus), "descriptions"]
    report = extended.report
    figures = {
        "tokens_saved_vs_general": pooled(found[DOMAIN], found[GENERAL], headline),
        "tokens_saved_vs_minilm": pooled(found[DOMAIN], found[DEFAULT_MODEL], headline),
        "extension_saved": report.tokens_saved,
        **checked,
        "extension_used": report.use.texts_used,
        "extension_used_pairs": report.use.pairs_used,
        "extension_appended": report.num_appended,
        "vocab_size": {name: len(tokenizer) for name, tokenizer in tokenizers.items()},
        "phrases": domain.report.num_phrases,
        "unused_tokens": domain.report.num_unused,
        "coverage": domain.report.coverage,
        "pooled_parts": headline,
        "saved_by_part": saved,
        "tokens_per_byte": {
            name: {part: figure.tokens_per_byte for part, figure in figures.items()}
            for name, figures in found.items()
        },
        "tokens_per_word": {
            name: {part: figure.tokens_per_word for part, figure in figures.items()}
            for name, figures in found.items()
        },
        "bytes": {part: figure.bytes for part, figure in found[DOMAIN].items()},
        "reached": {
            "tokens_saved_34": min(
                pooled(found[DOMAIN], found[other], headline) for other in saved
            ) >= 0.34,
            "extension_saved_15": report.tokens_saved >= 0.15,
            "extension_none_longer": checked["extension_longer"] == 0,
            "extension_used_90": min(report.use.texts_used, report.use.pairs_used) >= 0.9,
        },
    }  # fmt: skip
    for key, value in figures.items():
        click.echo(f"{key}: {value}", err=True)
    if write:
        click.echo(write_result("tokenizer", given_command("bench_tokenizer"), figures))


def domain_sources(corpus: CorpusManifest) -> list[str]:
    return [name for name, summary in corpus.sources.items() if summary.kind == "domain"]


def general_tokenizer(home: Home, corpus: CorpusManifest, size: int) -> PreTrainedTokenizerFast:
    """Train GPT-2's kind of tokenizer on general English, with rare pairs too: of the same size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=1,
        special_tokens=list(corpus.special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = read_documents(home, "train", PYTHON_DOCS)["text"].to_pylist()
    tokenizer.train_from_iterator(texts, trainer)
    return wrap(tokenizer, corpus.special_tokens)


def held_out_parts(home: Home, corpus: CorpusManifest) -> dict[str, list[str]]:
    """The test split, and the descriptions that were sold in it."""
    with query_engine() as connection:
        rows = connection.execute(
            DESCRIPTIONS,
            {
                "events": str(home.events / "*.parquet"),
                "behaviors": str(home.behaviors),
                "test": load_manifest(home).split.test,
            },
        ).fetchall()
    return held_out_texts(home, corpus) | {
        "descriptions": [text for text, _, _ in rows],
        "descriptions, new": [text for text, is_new, _ in rows if is_new],
    }


def pooled(own: dict[str, Fertility], other: dict[str, Fertility], parts: Sequence[str]) -> float:
    return 1 - sum(own[part].tokens for part in parts) / sum(other[part].tokens for part in parts)


def strings(home: Home, num: int) -> Iterator[str]:
    """Half random Unicode, half lines of real documents of the test and the training split."""
    random = np.random.default_rng(0)
    for _ in range(num // 2):
        planes = random.integers(len(PLANES), size=random.integers(1, 4))
        length = random.integers(LONGEST_RANDOM)
        chosen = [PLANES[plane] for plane in random.choice(planes, size=length)]
        yield "".join(chr(random.integers(low, high)) for low, high in chosen)
    sources = load_corpus(home).sources
    yield from islice(_lines(home, list(sources)), num - num // 2)


def _lines(home: Home, sources: Sequence[str]) -> Iterator[str]:
    for split in ("test", "train"):
        for source in sources:
            # Of every source a share, so that long ones leave room for the others.
            texts = read_documents(home, split, source)["text"].to_pylist()
            lines = (line for text in texts for line in text.splitlines() if line)
            yield from islice(lines, 10_000)
    for source in sources:
        yield from read_documents(home, "valid", source)["text"].to_pylist()


def check_lengths(base: Any, extended: Any, texts: Iterator[str]) -> dict[str, int]:
    num = longer = shorter = otherwise = 0
    while batch := list(islice(texts, BATCH)):
        before, after = token_ids(base, batch), token_ids(extended, batch)
        for old, new in zip(before, after, strict=True):
            longer += len(new) > len(old)
            shorter += len(new) < len(old)
        otherwise += sum(
            one != other
            for one, other in zip(base.batch_decode(before), extended.batch_decode(after),
                                  strict=True)
        )  # fmt: skip
        num += len(batch)
    return {
        "extension_longer": longer,
        "extension_decoded_otherwise": otherwise,
        "extension_shorter": shorter,
        "extension_strings": num,
    }


DEFAULT_STRINGS = 100_000


@click.command()
@click.option(
    "--home",
    type=click.Path(file_okay=False, path_type=Path),
    help="With Online Retail II ingested.  [default: a new one for the time of the run]",
)
@click.option("--strings", type=click.IntRange(min=2), default=DEFAULT_STRINGS, show_default=True)
@click.option("--write/--no-write", default=True, show_default=True, help="A result file.")
def run(home: Path | None, strings: int, write: bool) -> None:
    """Measure the tokenizers of issue 6."""
    main(home, strings, write)


if __name__ == "__main__":
    run()
