"""The command ``lm corpus``."""

import time
from typing import Any

import click

from encoders.lm.built_in_sources import BUILT_IN
from feature_repo.command import Settings, emit, pass_settings
from feature_repo.errors import DataSetError
from feature_repo.home import Home
from feature_repo.progress import BarLine


@click.command(short_help="Collect the text that an own language model learns from.")
@click.option(
    "--built-in",
    "built_in",
    multiple=True,
    type=click.Choice(BUILT_IN),
    default=BUILT_IN,
    show_default=True,
    help="Source to take: records of the home's tables, or Python's documentation as general text.",
)
@click.option(
    "--source",
    "files",
    multiple=True,
    metavar="NAME=KIND:GLOB",
    help="Files of your own: parquet, JSONL, else text; KIND is domain or general.",
)
@click.option(
    "--text-column", default="text", show_default=True, help="Of parquet and JSONL files."
)
@click.option(
    "--time-column",
    default="time",
    show_default=True,
    help="Of parquet and JSONL files; where it is missing, documents are split by hash.",
)
@click.option(
    "--history-days",
    type=click.IntRange(min=1),
    default=91,
    show_default=True,
    help="Length of the periods that users' histories are cut into.",
)
@click.option(
    "--near-duplicates",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.8,
    show_default=True,
    help="Likeness from which two listings or free texts count as one; 1 = exact copies only.",
)
@click.option(
    "--min-characters",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="Shorter free texts are left out.",
)
@click.option(
    "--language",
    "languages",
    multiple=True,
    metavar="CODE",
    help="Keep only free text of this language (en, de, ...).  [default: all]",
)
@click.option("--scrub", is_flag=True, help="Replace e-mail, phone, card, IBAN and IP numbers.")
@click.option(
    "--weight",
    "weights",
    multiple=True,
    metavar="SOURCE=FACTOR",
    help="How often a source is drawn, against its size.  [default: 1]",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    default=2.0,
    show_default=True,
    help="Above 1, small sources are drawn more often than their size; 1 is in proportion.",
)
@click.option(
    "--general-share",
    type=click.FloatRange(min=0, max=1),
    default=None,
    show_default="as its bytes say; 0.5 where a pretrained model goes on",
    help="Share of general text in what a model learns from.",
)
@pass_settings
def corpus(
    settings: Settings,
    *,
    built_in: tuple[str, ...],
    files: tuple[str, ...],
    text_column: str,
    time_column: str,
    history_days: int,
    near_duplicates: float,
    min_characters: int,
    languages: tuple[str, ...],
    scrub: bool,
    weights: tuple[str, ...],
    temperature: float,
    general_share: float | None,
) -> None:
    """Collect the text that an own language model learns from.

    Records of the tables become text by templates; free text is filtered, labelled by language and
    freed of duplicates; everything is split by the data set's times. A build that was killed goes
    on when the same command is given again.

    \b
    Examples:
      longtrail lm corpus
      longtrail lm corpus --source reviews=domain:'reviews/*.jsonl' --language en --scrub
    """  # noqa: D301  # click takes the backspace itself
    from encoders.lm.corpus import MixtureConfig
    from encoders.lm.corpus_builder import CorpusConfig
    from encoders.lm.filters import FilterConfig
    from encoders.lm.quality import QualityConfig
    from encoders.lm.text_files import parse_source

    config = CorpusConfig(
        sources=tuple(dict.fromkeys(built_in)),
        files=tuple(
            parse_source(text, text_column=text_column, time_column=time_column) for text in files
        ),
        history_days=history_days,
        filters=FilterConfig(
            quality=QualityConfig(min_characters=min_characters),
            near_duplicates=None if near_duplicates == 1 else near_duplicates,
            languages=languages,
            scrub=scrub,
        ),
        mixture=MixtureConfig(
            general_share=general_share,
            temperature=temperature,
            weights=dict(_weight(text) for text in weights),
        ),
    )
    emit(build_and_tell(settings.home, config))


commands: list[click.Command] = [corpus]


def build_and_tell(home: Home, config: Any) -> dict[str, Any]:
    """Build the corpus with a bar; what the command prints of it.

    Args:
        home: Ingest has been run.
        config: A :class:`encoders.lm.corpus_builder.CorpusConfig`.
    """
    from encoders.lm.corpus_builder import build_corpus

    began = time.perf_counter()
    with BarLine() as bars:
        manifest = build_corpus(home, config, bars.bar("corpus", "documents"))
    sources = manifest.sources
    return {
        "folder": str(home.corpus),
        "fingerprint": manifest.fingerprint,
        "until": manifest.until.isoformat(),
        "documents": {
            name: {split: size.documents for split, size in summary.splits.items()}
            for name, summary in sources.items()
        },
        "train_bytes": {name: summary.train_bytes for name, summary in sources.items()},
        "dropped": {name: found.dropped for name, found in sources.items() if found.dropped},
        "seconds": round(time.perf_counter() - began, 1),
    }


def corpus_must_be(home: Home) -> None:
    """Build the default corpus where there is none."""
    from encoders.lm.corpus import manifest_path
    from encoders.lm.corpus_builder import CorpusConfig

    if not manifest_path(home).exists():
        build_and_tell(home, CorpusConfig())


def _weight(text: str) -> tuple[str, float]:
    name, _, factor = text.partition("=")
    try:
        return name, float(factor)
    except ValueError as error:
        raise DataSetError(
            f"--weight must be SOURCE=FACTOR, such as listings=2, got {text!r}"
        ) from error
