"""The command evaluate."""

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click

from encoders.cli_options import threads_option
from feature_repo.command import Settings, emit, pass_settings, say
from feature_repo.progress import BarLine
from training.recipes import RECIPES

# torch and scikit-learn take seconds to import, and `longtrail --help` must be quick: a command
# imports the modules that need them when it runs.


@click.command(short_help="Measure and compare trained models.")
@click.argument("runs", metavar="[RUN]...", nargs=-1)
@click.option(
    "--against",
    multiple=True,
    metavar="RUN",
    help="Also compare with this run on the same rows; give it several times for several seeds.",
)
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
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write an HTML page with plots to this file.",
)
@click.option(
    "--ablate",
    is_flag=True,
    help="Train --recipe and its variants without text, deep half, age, exact ids, fine-tuning and "
    "domain tuning, and compare them; finished runs are not trained again.",
)
@click.option(
    "--recipe",
    "recipe_name",
    type=click.Choice(sorted(name for name in RECIPES if name.startswith("bahe"))),
    default="bahe_small",
    show_default=True,
    help="Of --ablate: the full model.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Of --ablate: runs per variant.",
)
@threads_option
@pass_settings
def evaluate(
    settings: Settings,
    *,
    runs: tuple[str, ...],
    against: tuple[str, ...],
    split: str,
    impressions: Path | None,
    report: Path | None,
    ablate: bool,
    recipe_name: str,
    seeds: int,
    threads: int | None,
) -> None:
    """Measure RUN (default: the one that is served) by its exported program, as it is served.

    Prints AUC, GAUC and logloss with 95 % intervals (whole users drawn 200 times), normalised
    entropy and calibration error, on all rows and on slices. Several RUNs, usually one per seed,
    give the means of their figures.

    \b
    Examples:
      longtrail evaluate bahe_small-20260101-120000 --report report.html
      longtrail evaluate seed0 seed1 seed2 --against other0 --against other1
      longtrail evaluate --ablate --recipe bahe_base --seeds 3 --report ablations.html
    """  # noqa: D301  # click takes the backspace itself
    if ablate and (runs or against or impressions):
        raise click.UsageError("--ablate takes no RUN, --against or --impressions")
    from encoders.devices import torch_threads
    from feature_repo.artifact import current_run
    from training.ablations import FULL
    from training.ablations import ablate as run_ablations
    from training.evaluate import load_rows, measure, score_runs
    from training.explain import explain_examples
    from training.report import write_report
    from training.sources import Sources

    started = time.monotonic()
    runs = () if ablate else runs or (current_run(settings.home),)
    sources = Sources.open(settings.home, settings.profile)
    with torch_threads(threads) as num_threads, BarLine() as bars:
        reading = bars.bar("reading features", "impressions")
        scoring = bars.bar("scoring", "impressions")
        if ablate:
            study = run_ablations(
                sources,
                RECIPES[recipe_name](),
                num_seeds=seeds,
                split=split,
                threads=num_threads,
                reading=reading,
                bar=partial(bars.bar, unit="impressions"),
                scoring=scoring,
            )
            evaluation, scored = study.evaluations[FULL], study.scored
            notes, result = study.notes, study.as_json()
        else:
            study = None
            scored = score_runs(
                sources,
                [*runs, *against],
                split=split,
                impressions=impressions,
                reading=reading,
                scoring=scoring,
            )
            evaluation = measure(scored, runs, against=against, started=started)
            notes = evaluation.notes
            result = {**asdict(evaluation), "seconds": round(evaluation.seconds, 1)}
    for note in notes:
        say(f"Note: {note}")
    if report is not None:
        rows = load_rows(sources, evaluation.runs[0], split, impressions)
        examples = explain_examples(sources, evaluation.runs[0], rows)
        write_report(report, evaluation, scored, study=study, examples=examples)
        result["report"] = str(report)
    emit(result)
