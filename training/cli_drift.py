"""The command drift."""

import re
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import click

from feature_repo.command import Settings, emit, pass_settings, say
from feature_repo.errors import NothingToCompareError
from feature_repo.progress import BarLine

# torch and Feast take seconds to import, and `longtrail --help` must be quick: a command imports
# the modules that need them when it runs.


def _span(value: str) -> timedelta:
    """The span that ``7d`` or ``36h`` spells."""
    found = re.fullmatch(r"(\d+)([dh])", value)
    if found is None or not int(found[1]):
        raise click.BadParameter(f"{value!r} is no span of days or hours such as 7d or 36h")
    return timedelta(**{{"d": "days", "h": "hours"}[found[2]]: int(found[1])})


@click.command(short_help="Compare new features with those of training.")
@click.option(
    "--against", metavar="RUN", help="Whose training rows.  [default: the run that is served]"
)
@click.option(
    "--window",
    callback=lambda _context, _parameter, value: _span(value),
    default="7d",
    show_default=True,
    help="Newest impressions to look at, days (d) or hours (h) up to now.",
)
@click.option(
    "--threshold",
    type=click.FloatRange(min=0, min_open=True),
    default=0.2,
    show_default=True,
    help="Of the population stability index, and of the cosine distance of mean vectors.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write an HTML page with plots to this file.",
)
@pass_settings
def drift(
    settings: Settings,
    *,
    against: str | None,
    window: timedelta,
    threshold: float,
    report: Path | None,
) -> None:
    """Hold the features of the newest impressions against the training rows of a run.

    Every input of the model is compared: numbers, categories, lengths and ages of histories, and
    the vectors of the texts. Exit code 1 where one has moved past the threshold and farther than
    chance explains; 0 and a sentence where the window has no impressions.

    \b
    Example:
      longtrail drift --window 30d --report drift.html
    """  # noqa: D301  # click takes the backspace itself
    from feature_repo.artifact import current_run
    from feature_repo.reader import FeatureReader
    from feature_repo.view_statistics import view_statistics
    from training.drift import measure_drift
    from training.drift_page import write_drift_page
    from training.sources import Sources

    started = time.monotonic()
    run = against or current_run(settings.home)
    sources = Sources.open(settings.home, settings.profile)
    try:
        with BarLine() as bars:
            reading = bars.bar("reading features", "impressions")
            found = measure_drift(
                sources, run, window=window, threshold=threshold, progress=reading
            )
    except NothingToCompareError as nothing:
        say(f"Nothing to compare: {nothing}")
        return
    assert isinstance(sources.reader, FeatureReader)
    views = view_statistics(sources.reader.store, found.views, start=found.start, end=found.end)
    result = {
        "run": run,
        "start": found.start,
        "end": found.end,
        "num_rows": found.window.num_rows,
        "num_contexts": found.window.num_contexts,
        "threshold": threshold,
        **asdict(found.drift),
        "views": {name: asdict(view) for name, view in views.items()},
        "seconds": round(time.monotonic() - started, 1),
    }
    if report is not None:
        write_drift_page(report, found, views, threshold=threshold)
        result["report"] = str(report)
    emit(result)
    if found.drift.drifted:
        say(
            f"Error: {len(found.drift.drifted)} features have moved past {threshold:g} since run "
            f"{run} was trained: {', '.join(found.drift.drifted[:5])}; look at --report, then "
            "train again if it is no mistake in the data"
        )
        raise SystemExit(1)
