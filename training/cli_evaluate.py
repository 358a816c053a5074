"""The command evaluate."""

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import click

from feature_repo.command import Settings, emit, pass_settings, say
from feature_repo.progress import late_bar

# torch and scikit-learn take seconds to import, and `longtrail --help` must be quick: a command
# imports the modules that need them when it runs.


@click.command(short_help="Measure a trained model.")
@click.argument("run", required=False)
@click.option(
    "--split",
    type=click.Choice(["train", "valid", "test"]),
    default="test",
    show_default=True,
    help="Which of the data set's impressions.",
)
@click.option(
    "--impressions",
    type=click.Path(path_type=Path),
    help="A labelled parquet or CSV file to score instead: request_id, user_id, item_id, "
    "event_timestamp, clicked.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Of the arithmetic.  [default: one per core]"
)
@pass_settings
def evaluate(
    settings: Settings, run: str | None, split: str, impressions: Path | None, threads: int | None
) -> None:
    r"""Measure RUN (default: the one that is served) by its exported program, as it is served.

    Prints AUC with a user-level bootstrap interval, GAUC, logloss, normalised entropy and
    calibration error, on all rows and on slices.

    \b
    Example:
      longtrail evaluate bahe_small-20260101-120000 --impressions labels.csv
    """
    from feature_repo.artifact import current_run
    from training.evaluate import evaluate as run_evaluation
    from training.sources import Sources
    from training.train import torch_threads

    run = run or current_run(settings.home)
    sources = Sources.open(settings.home, settings.profile)
    with torch_threads(threads), ExitStack() as bars:
        result = run_evaluation(
            sources,
            run,
            split=split,
            impressions=impressions,
            reading=late_bar(bars, "reading features", "impressions"),
            scoring=late_bar(bars, "scoring", "impressions"),
        )
    for note in result.notes:
        say(f"Note: {note}")
    emit({**asdict(result), "seconds": round(result.seconds, 1)})
