"""Commands about what was served: compared with what is stored, and joined with clicks."""

from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from feature_repo.command import Settings, emit, pass_settings, say
from feature_repo.dataset import load_dataset
from feature_repo.errors import NothingToCompareError
from feature_repo.progress import progress_bar

# The commands import PyTorch, Feast and DuckDB inside: `longtrail --help` stays instant.

if TYPE_CHECKING:
    from feature_repo.parity import ParityReport
    from feature_repo.view_reader import Join

_FILE = click.Path(dir_okay=False, path_type=Path)
_since_option = click.option(
    "--since",
    type=click.DateTime(["%Y-%m-%d"]),
    help="First day of the log of served requests, UTC.  [default: all]",
)


@click.command()
@click.option(
    "--sample",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    help="Keys of each view; with --served, requests.",
)
@click.option(
    "--join",
    type=click.Choice(["feast", "fast"]),
    default="feast",
    show_default=True,
    help="How rows are found offline: by Feast's own join, or as training finds them.",
)
@click.option("--served", is_flag=True, help="Compare what requests were answered from.")
@_since_option
@pass_settings
def parity(
    settings: Settings, sample: int, join: "Join", served: bool, since: datetime | None
) -> None:
    """Compare what training reads with what serving reads, value by value.

    Without --served both stores are read now. With it the log of served requests is compared with
    what the offline store says of the moments of those requests, and their scores are computed
    again; then "online" in the result is what was served.

    Exit code 1 and the first differences where there are any; 0 and a sentence where the log has
    nothing since that day. Every run is a line in
    HOME/parity.jsonl, and HOME/metrics/parity.prom is for Prometheus.

    Example: longtrail parity --sample 5000 --join fast
    """
    if since is not None and not served:
        raise click.UsageError("--since chooses among served requests: give --served as well")
    try:
        report = _check_served(settings, sample, join, since) if served else _check(
            settings, sample, join
        )  # fmt: skip
    except NothingToCompareError as nothing:
        say(f"Nothing to compare: {nothing}")
        return
    mend = (
        "what was served came before some events, or before a copy to the online store: see "
        "docs/serving.md"
        if served
        else "run `longtrail materialize --full`"
    )
    for name, view in report.views.items():
        if view.wrong:
            first = view.differences[0]
            say(
                f"Error: {name}: {view.mismatches:,} of {view.values:,} values differ, "
                f"{view.missing_online:,} rows are missing online and {view.missing_offline:,} "
                f"offline; first {first['feature']} of {first['key']}: {first['offline']} offline, "
                f"{first['online']} online; {mend}"
            )
    if report.mismatches:
        raise SystemExit(1)


def _check(settings: Settings, sample: int, join: "Join") -> "ParityReport":
    from feature_repo.parity import check_parity

    with progress_bar("parity", "keys") as progress:
        report = check_parity(
            settings.home, settings.profile, sample=sample, join=join, progress=progress
        )
    _emit(settings, sample, report, {})
    return report


def _check_served(
    settings: Settings, sample: int, join: "Join", since: datetime | None
) -> "ParityReport":
    from serving.replay import check_served

    with progress_bar("parity", "requests") as progress:
        report = check_served(
            settings.home,
            settings.profile,
            sample=sample,
            join=join,
            since=_day(since),
            progress=progress,
        )
    _emit(settings, sample, report, report.counts.model_dump())
    return report


def _emit(
    settings: Settings, sample: int, report: "ParityReport", counts: dict[str, float]
) -> None:
    emit(
        {
            "profile": settings.profile,
            "sample": sample,
            **counts,
            "compared_values": report.compared_values,
            "mismatches": report.mismatches,
            "views": {name: asdict(view) for name, view in report.views.items()},
            "seconds": round(report.seconds, 3),
        }
    )


def _day(since: datetime | None) -> date | None:
    return since.date() if since else None


@click.command()
@click.argument("out", type=_FILE)
@click.option(
    "--clicks",
    type=_FILE,
    help="Parquet, CSV or JSON file: request_id, item_id and, where known, event_timestamp.",
)
@click.option("--clicks-sql", help="Or a query that gives these columns, in DuckDB's dialect.")
@click.option(
    "--window-hours",
    type=click.FloatRange(min=0, min_open=True),
    default=24.0,
    show_default=True,
    help="A click counts if it came at most so long after its request.",
)
@click.option(
    "--dataset",
    type=_FILE,
    help="Data set file whose events and items go with the requests: writes one beside OUT.",
)
@_since_option
@pass_settings
def impressions(
    settings: Settings,
    out: Path,
    clicks: Path | None,
    clicks_sql: str | None,
    window_hours: float,
    dataset: Path | None,
    since: datetime | None,
) -> None:
    """Join served requests with clicks into impressions to train on, the parquet file OUT.

    The items that a request returned become its impressions. Requests whose window is not over yet
    are left out. With --dataset, OUT with the ending .toml describes the whole data set: give it to
    `longtrail ingest`.

    Example: longtrail impressions shown.parquet --clicks clicks.csv --dataset shop.toml
    """
    from feature_repo.served_impressions import clicks_query, join_clicks, write_dataset

    if (clicks is None) == (clicks_sql is None):
        raise click.UsageError("give either --clicks or --clicks-sql")
    query = clicks_sql if clicks is None else clicks_query(clicks)
    assert query is not None
    base = load_dataset(dataset) if dataset is not None else None
    window = timedelta(hours=window_hours)
    joined = join_clicks(
        settings.home, query, out, window=window, now=datetime.now(UTC), since=_day(since)
    )
    written = {"impressions_file": str(out)}
    if base is not None:
        toml = out.with_suffix(".toml")
        write_dataset(base, out, toml, window=window)
        written["dataset_file"] = str(toml)
    emit(asdict(joined) | written)


commands: list[click.Command] = [parity, impressions]
