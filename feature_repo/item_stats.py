"""Item features: the item's own columns and its popularity, point-in-time, as daily snapshots.

The snapshot of a day holds everything before its midnight (UTC). There is one only where something
changes: an event the day before, an event that falls out of a window, a new version of the item.
A version's own time has a row as well, with the statistics of the midnight before it, so that a new
item has its text from its first second. A day is closed by an event at or after its midnight, so no
snapshot lies after the last event. ``item_snapshots`` has the expressions.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from feature_repo.click_rates import click_fields
from feature_repo.errors import DataSetError
from feature_repo.feature_files import (
    BuildSummary,
    WholeView,
    event_buckets,
    file_fingerprint,
    view_settings,
    write_rows,
)
from feature_repo.fields import FeatureField, arrow_schema
from feature_repo.home import Home
from feature_repo.item_snapshots import (
    COUNT_WINDOWS_DAYS,
    daily_counts,
    daily_impressions,
    item_rows,
)
from feature_repo.manifest import DataManifest
from feature_repo.progress import Progress

VIEW = "items"
VERSION = 1
"""Raised whenever the rows change for the same inputs."""
DAILY_ROWS_PER_PART = 250_000
"""Daily counts per file: each becomes at most ten rows of changes, about 1 GB in the engine."""
_DAILY = "daily_counts"


def fields(manifest: DataManifest) -> tuple[FeatureField, ...]:
    """Return the fields of the view, in the order of the files.

    Raises:
        DataSetError: If a column of the data set has the name of a feature.
    """
    own = [
        FeatureField(
            column.name,
            "float32" if column.kind == "numeric" else "string",
            "column of the data set, as it is there; null where it has none",
        )
        for column in manifest.item_columns
    ]
    built = [field for scene in manifest.scenes for field in _scene_fields(scene)]
    built.append(
        FeatureField(
            "listed_time",
            "float64",
            "time of the item's first version; epoch seconds, rounded down, null where the data "
            "set gives no time",
        )
    )
    if manifest.impressions == "logged":
        built.extend(click_fields())
    taken = {"item_id", "event_timestamp", "created_timestamp", "text_id"}
    clash = [field.name for field in own if field.name in taken | {f.name for f in built}]
    if clash:
        raise DataSetError(
            f"[items] has the columns {clash}, which are names of built features; expected other "
            "names: rename them in the SQL"
        )
    text = FeatureField("text_id", "int64", "63-bit hash of the title's text")
    return (text, *own, *built)


def build_item_stats(
    home: Home, manifest: DataManifest, progress: Progress, *, threads: int = 2
) -> BuildSummary:
    """Build the files of the view where events, items, impressions or settings changed.

    Args:
        home: Where events, items and impressions are read and features are written.
        manifest: What ingest wrote.
        progress: Receives events done of all events, in shares as the files are written.
        threads: Threads of the query engine.

    Raises:
        MissingStepError: If there are no events.
        DataSetError: If a column of the data set has the name of a feature.
        LongtrailError: If another process builds the same view.
    """
    logged = manifest.impressions == "logged"
    settings = view_settings(
        manifest,
        version=VERSION,
        last_event=manifest.last_event.isoformat(),
        items=file_fingerprint(home.items),
    )
    if logged:
        settings["impressions"] = file_fingerprint(home.impressions)
        settings["label_delay_us"] = manifest.label_delay_us
    schema = arrow_schema("item_id", fields(manifest))

    def write(connection: Any, folder: Path, done: Callable[[int, int], None]) -> dict[str, int]:
        versions = connection.read_parquet(home.items)
        seen = None
        if logged:
            impressions = connection.read_parquet(home.impressions)
            seen = daily_impressions(impressions, manifest.label_delay_us)
        for index, path in enumerate(event_buckets(home).values()):
            counts = daily_counts(connection.read_parquet(path))
            if index == 0:
                connection.create_table(_DAILY, counts)
            else:
                connection.insert(_DAILY, counts)
        daily = connection.table(_DAILY)
        num_daily = int(connection.to_pyarrow(daily.count()).as_py())
        num_parts = max(1, math.ceil(num_daily / DAILY_ROWS_PER_PART))
        files = {}
        for index in range(num_parts):
            rows = item_rows(
                _part(versions, index, num_parts),
                _part(daily, index, num_parts),
                None if seen is None else _part(seen, index, num_parts),
                manifest,
            )
            name = f"part-{index:05d}.parquet"
            files[name] = write_rows(connection, rows, schema, folder / name)
            done(index, num_parts)
        return files

    view = WholeView(home.view(VIEW), schema, settings, write)
    return view.build(home, progress, threads=threads)


def _part(table: Any, index: int, num_parts: int) -> Any:
    """Return the rows of the items that belong to one of the files."""
    return table.filter((table.item_id.hash() % num_parts).abs() == index)


def _scene_fields(scene: str) -> tuple[FeatureField, ...]:
    here = f"with the item in the scene {scene!r} before the last midnight"
    return (
        *(
            FeatureField(
                f"{scene}_count_{days}d",
                "float32",
                f"behaviours {here}, at most {days} days before it; a count",
            )
            for days in COUNT_WINDOWS_DAYS
        ),
        FeatureField(f"{scene}_count_total", "float32", f"behaviours {here}; a count"),
        FeatureField(
            f"{scene}_trend",
            "float32",
            f"ln((c7 + 1) / (c30 * 7 / 30 + 1)) of the counts of 7 and 30 days in the scene "
            f"{scene!r}; no unit, 0 where the last week was as the month",
        ),
        FeatureField(f"{scene}_buyers_total", "float32", f"distinct users {here}; a count"),
        FeatureField(
            f"{scene}_first_time",
            "float64",
            f"time of the first behaviour {here}; epoch seconds, rounded down, null without any",
        ),
        FeatureField(
            f"{scene}_last_time",
            "float64",
            f"time of the last behaviour {here}; epoch seconds, rounded down, null without any",
        ),
    )
