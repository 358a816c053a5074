"""The commands ``lm tokenizer`` and ``lm extend``."""

import time
from pathlib import Path
from typing import Any

import click

from encoders.lm.cli_corpus import corpus_must_be
from encoders.lm.tokenizer_config import ExtendConfig, TokenizerConfig
from feature_repo.command import Settings, emit, pass_settings, say
from feature_repo.progress import BarLine


@click.command(short_help="Train an own tokenizer on the corpus.")
@click.option(
    "--name",
    default=TokenizerConfig.name,
    show_default=True,
    help="Of the tokenizer; one that this command made is replaced: models carry their own copy.",
)
@click.option(
    "--vocab-size",
    type=click.IntRange(min=1),
    default=TokenizerConfig.vocab_size,
    show_default=True,
    help="Tokens at most; fewer where none is frequent enough.",
)
@click.option(
    "--phrase-share",
    type=click.FloatRange(min=0, max=0.9),
    default=TokenizerConfig.phrase_share,
    show_default=True,
    help="Of the tokens that may hold several words; 0 makes an ordinary tokenizer.",
)
@click.option(
    "--min-frequency",
    type=click.IntRange(min=1),
    default=TokenizerConfig.min_frequency,
    show_default=True,
    help="How often a pair within words was seen.",
)
@click.option(
    "--phrase-min-frequency",
    type=click.IntRange(min=1),
    default=TokenizerConfig.phrase_min_frequency,
    show_default=True,
    help="How often a pair across words was seen.",
)
@click.option(
    "--phrase-min-texts",
    type=click.IntRange(min=1),
    default=TokenizerConfig.phrase_min_texts,
    show_default=True,
    help="In how many distinct fields or lines it was seen.",
)
@click.option(
    "--from",
    "sources",
    multiple=True,
    metavar="SOURCE",
    help="Source of the corpus to learn from.  [default: all]",
)
@pass_settings
def tokenizer(settings: Settings, /, **options: Any) -> None:
    """Train an own tokenizer: byte-level BPE of the corpus' words and phrases.

    Builds the corpus where there is none. The page report.html in the tokenizer's folder compares
    it with others on held-out text.

    \b
    Examples:
      longtrail lm tokenizer
      longtrail lm tokenizer --name general --from python_docs --phrase-share 0
    """  # noqa: D301  # click takes the backspace itself
    from encoders.lm.tokenizer import train_tokenizer

    began = time.perf_counter()
    config = TokenizerConfig(**options)
    corpus_must_be(settings.home)
    with BarLine() as bars:
        summary = train_tokenizer(
            settings.home,
            config,
            bars.bar("read", "texts"),
            phrase_progress=bars.bar("learn", "phrases"),
        )
    report = summary.report
    if report.vocab_size < config.vocab_size:
        say(
            f"Stopped at {report.vocab_size:,} of {config.vocab_size:,} tokens: no other pair was "
            "frequent enough."
        )
    emit(
        {
            "folder": str(summary.folder),
            "name": report.name,
            "vocab_size": report.vocab_size,
            "phrases": report.num_phrases,
            "unused": report.num_unused,
            "coverage": round(report.coverage, 4),
            "tokens_per_byte": {
                name: {part: round(found.tokens_per_byte, 4) for part, found in parts.items()}
                for name, parts in report.sources.items()
            },
            "seconds": round(time.perf_counter() - began, 1),
        }
    )


@click.command(short_help="Append domain tokens to a tokenizer that exists.")
@click.argument("base")
@click.option(
    "--name", default="extended", show_default=True, help="Of the result, in the home folder."
)
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=None,
    help="Folder of the base's model: the result is a model folder with vectors for new tokens.",
)
@click.option(
    "--num-tokens",
    type=click.IntRange(min=1),
    default=ExtendConfig.num_tokens,
    show_default=True,
    help="Appended at most.",
)
@click.option(
    "--min-frequency",
    type=click.IntRange(min=1),
    default=ExtendConfig.min_frequency,
    show_default=True,
    help="How often a token was seen in the corpus.",
)
@pass_settings
def extend(
    settings: Settings,
    *,
    base: str,
    name: str,
    model: Path | None,
    num_tokens: int,
    min_frequency: int,
) -> None:
    """Append domain tokens to BASE, a byte-level BPE tokenizer; no input ever gets longer.

    BASE is a folder with tokenizer.json, or the name of a tokenizer of this home. A new token's
    vectors begin as the mean of those of its old pieces.

    Example: longtrail lm extend models/llama --model models/llama --num-tokens 8000
    """
    from encoders.lm.extended_folder import extend_tokenizer

    began = time.perf_counter()
    config = ExtendConfig(num_tokens=num_tokens, min_frequency=min_frequency)
    corpus_must_be(settings.home)
    with BarLine() as bars:
        summary = extend_tokenizer(
            settings.home,
            base,
            name,
            config,
            model=model,
            progress=bars.bar("extend", "documents"),
        )
    report = summary.report
    emit(
        {
            "folder": str(summary.folder),
            "base": report.base,
            "vocab_size": report.vocab_size_before + report.num_appended,
            "appended": report.num_appended,
            "tokens_saved": round(report.tokens_saved, 4),
            "used": round(report.use.texts_used, 4),
            "model": report.model,
            "seconds": round(time.perf_counter() - began, 1),
        }
    )


commands: list[click.Command] = [tokenizer, extend]
