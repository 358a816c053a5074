"""Commands that make features and look at them."""

import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from feature_repo.command import Settings, emit, pass_settings, say
from feature_repo.dataset import load_dataset
from feature_repo.manifest import load_manifest
from feature_repo.progress import Progress, progress_bar
from feature_repo.publish import publish
from feature_repo.shop import ShopConfig, generate_shop

# Feast and ibis take seconds to import: only the commands that need them load them, inside.

if TYPE_CHECKING:
    from feature_repo.ingest import IngestSummary

_FILE = click.Path(dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.argument("folder", type=_FOLDER)
@click.option("--num-users", default=ShopConfig.num_users, show_default=True, help="Customers.")
@click.option(
    "--num-events",
    default=ShopConfig.num_events,
    show_default=True,
    help="Searches and purchases; at least 10 per user.",
)
@click.option("--seed", default=ShopConfig.seed, show_default=True, help="Of all randomness.")
def shop(folder: Path, num_users: int, num_events: int, seed: int) -> None:
    """Generate the built-in shop's raw logs into FOLDER.

    Example: longtrail shop /tmp/shop --num-users 5000 --num-events 200000
    """
    summary = generate_shop(
        folder, ShopConfig(num_users=num_users, num_events=num_events, seed=seed)
    )
    emit({"folder": str(folder), **asdict(summary)})


@click.command()
@click.argument("toml", type=_FILE)
@click.option("--data-dir", type=_FOLDER, help="What {dir} in the queries stands for.")
@click.option("--dry-run", is_flag=True, help="Show counts, ranges and samples; write nothing.")
@pass_settings
def ingest(settings: Settings, toml: Path, data_dir: Path | None, dry_run: bool) -> None:
    """Turn the raw logs that TOML describes into canonical tables.

    Rows that cannot be used go to tables/rejected.parquet with the reason. Running it again on the
    same files changes nothing.

    Example: longtrail ingest feature_repo/datasets/online_retail.toml --dry-run
    """
    from feature_repo.ingest import ingest as run_ingest
    from feature_repo.live_events import live_source

    began = time.perf_counter()
    dataset = load_dataset(toml, data_dir=data_dir)
    with progress_bar("ingest", "steps") as progress:
        live = live_source(settings.home, settings.profile, dataset.content.name)
        summary = run_ingest(settings.home, dataset, live=live, dry_run=dry_run, progress=progress)
    for note in summary.notes:
        say(f"Note: {note}.")
    loaded = {} if dry_run else publish(settings)
    emit(ingest_result(summary, dry_run=dry_run, seconds=time.perf_counter() - began) | loaded)


def ingest_result(summary: "IngestSummary", *, dry_run: bool, seconds: float) -> dict[str, Any]:
    """The JSON line of an ingest."""
    manifest = summary.manifest.model_dump(mode="json")
    shown = [name for name in manifest if name not in ("source_fingerprint", "num_buckets")]
    result: dict[str, Any] = {name: manifest[name] for name in shown}
    result |= {
        "changed": summary.changed,
        "rejected": summary.rejected,
        "notes": list(summary.notes),
        "seconds": round(seconds, 3),
    }
    if dry_run:
        result |= {"dry_run": True, "samples": summary.samples}
    return result


@click.command()
@click.option("--threads", type=int, default=2, show_default=True, help="Of the query engine.")
@pass_settings
def sequences(settings: Settings, threads: int) -> None:
    """Build point-in-time features: user sequences and statistics, item snapshots and neighbours.

    Only what is new since the last run is built.

    Example: longtrail sequences
    """
    emit(build_features(settings, threads=threads) | publish(settings))


def build_features(settings: Settings, *, threads: int = 2) -> dict[str, Any]:
    """Build the four views; the command's JSON line."""
    from feature_repo.item_neighbors import build_item_neighbors
    from feature_repo.item_stats import build_item_stats
    from feature_repo.live_events import EventJournal
    from feature_repo.sequences import build_sequences
    from feature_repo.user_stats import build_user_stats

    manifest = load_manifest(settings.home)
    builds = {
        "user_sequences": build_sequences,
        "user_stats": build_user_stats,
        "items": build_item_stats,
        "item_neighbors": build_item_neighbors,
    }
    result = {}
    for name, build in builds.items():
        with progress_bar(name, "events") as progress:
            result[name] = asdict(build(settings.home, manifest, progress, threads=threads))
    if journal := EventJournal.find(settings.home, settings.profile, manifest.dataset):
        from feature_repo.live_offline import write_live_rows

        write_live_rows(settings.home, journal, built=manifest.live_sequence)
    return result


@click.command()
@pass_settings
def apply(settings: Settings) -> None:
    """Register entities, views and services; the same as `feast apply` in feature_repo/.

    Example: longtrail apply
    """
    from feature_repo.materialize import apply as run_apply

    emit(asdict(run_apply(settings.home, settings.profile)) | publish(settings))


@click.command()
@click.option("--full", is_flag=True, help="Copy everything again, over what is online.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Threads.")
@pass_settings
def materialize(settings: Settings, full: bool, workers: int) -> None:
    """Copy each key's latest features to the online store.

    Example: longtrail materialize
    """
    from feature_repo.materialize import materialize as run_materialize

    began = time.perf_counter()
    views = run_materialize(
        settings.home, settings.profile, full=full, num_workers=workers, bars=row_bars
    )
    emit(
        {
            "views": {
                view.name: {
                    "from": view.start,
                    "rows": view.num_rows,
                    "removed": view.num_removed,
                    "future": view.num_future,
                    "seconds": round(view.seconds, 3),
                }
                for view in views
            },
            "seconds": round(time.perf_counter() - began, 3),
        }
    )


def row_bars(view: str) -> AbstractContextManager[Progress]:
    """A bar for the rows of a view."""
    return progress_bar(f"materialize {view}", "rows")


@click.command()
@pass_settings
def doctor(settings: Settings) -> None:
    """Check configuration and contents of the live stores; say what is wrong and what to do.

    Changes nothing. Exit code 1 where something is wrong.

    Example: longtrail doctor
    """
    from feature_repo.doctor import examine

    with progress_bar("doctor", "checks") as progress:
        findings = examine(settings.home, settings.profile, progress=progress)
    is_well = all(finding.ok for finding in findings)
    for finding in findings:
        say(f"{'ok   ' if finding.ok else 'WRONG'} {finding.name}: {finding.detail}")
        if finding.fix:
            say(f"      -> {finding.fix}")
    emit(
        {
            "profile": settings.profile,
            "ok": is_well,
            "checks": [asdict(finding) for finding in findings],
        }
    )
    if not is_well:
        raise SystemExit(1)


@click.command()
@pass_settings
def status(settings: Settings) -> None:
    """Show freshness, counts, lag and versions of every view, and whether the servers are up.

    Exit code 1 where a server does not answer.

    Example: longtrail status
    """
    from feature_repo.status import as_json, look
    from feature_repo.status_table import status_lines

    seen = look(settings.home, settings.profile)
    for line in status_lines(seen):
        say(line)
    emit(as_json(seen))
    if not seen.ok:
        raise SystemExit(1)


commands: list[click.Command] = [
    shop,
    ingest,
    sequences,
    apply,
    materialize,
    doctor,
    status,
]
