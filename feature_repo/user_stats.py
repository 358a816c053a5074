"""User statistics: activity per scene, one row per user and distinct moment at which it changes.

A row holds everything up to and including its source time: an event's own time, or, where real
impressions were logged, the time at which an impression's click is known. Times are stored, not
ages: the reader turns every ``*_time`` into an age at request time.
"""

from datetime import datetime
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from feature_repo.behavior import hash63_array
from feature_repo.click_rates import CLICK_WINDOW_DAYS, click_features, click_fields
from feature_repo.feature_files import (
    DAY_S,
    BucketedView,
    BuildSummary,
    file_fingerprint,
    view_settings,
)
from feature_repo.fields import FeatureField, arrow_schema
from feature_repo.home import Home
from feature_repo.manifest import DataManifest
from feature_repo.progress import Progress

VIEW = "user_stats"
VERSION = 1
"""Raised whenever the rows change for the same events."""
COUNT_WINDOWS_DAYS = (7, 30, 90, 365)
_BATCH_SIZE = 500_000


def fields(manifest: DataManifest) -> tuple[FeatureField, ...]:
    """Return the fields of the view, in the order of the files."""
    of_scenes = [field for scene in manifest.scenes for field in _scene_fields(scene)]
    return (*of_scenes, *(click_fields() if manifest.impressions == "logged" else ()))


def build_user_stats(
    home: Home, manifest: DataManifest, progress: Progress, *, threads: int = 2
) -> BuildSummary:
    """Bring the files of the view up to date: buckets whose inputs changed are built anew.

    Args:
        home: Where events and impressions are read and features are written.
        manifest: What ingest wrote.
        progress: Receives events done of all events.
        threads: Threads of the query engine.

    Raises:
        MissingStepError: If there are no events.
        LongtrailError: If another process builds the same view.
    """
    settings = view_settings(manifest, version=VERSION)
    impressions = None
    if manifest.impressions == "logged":
        impressions = _BucketedImpressions(home.impressions, manifest.num_buckets)
        settings["impressions"] = file_fingerprint(home.impressions)
        settings["label_delay_us"] = manifest.label_delay_us

    def rows(connection: Any, bucket: int, events: Any, _after: datetime | None) -> Any:
        seen = impressions.of_bucket(connection, bucket) if impressions else None
        return user_rows(events, seen, manifest)

    view = BucketedView(
        folder=home.view(VIEW),
        schema=arrow_schema("user_id", fields(manifest)),
        settings=settings,
        rows=rows,
        extendable=False,
    )
    return view.build(home, progress, threads=threads)


def user_rows(events: Any, impressions: Any | None, manifest: DataManifest) -> Any:
    """Return the rows of the view, without ``created_timestamp``.

    Args:
        events: ibis table with user_id, event_timestamp, scene, behavior_id, item_key; no nulls.
        impressions: ibis table with user_id, event_timestamp, clicked; None where not logged.
        manifest: Scenes and delays.

    Returns:
        ibis table: user_id, event_timestamp and the fields.
    """
    scenes = manifest.scenes
    moments = _event_moments(events, scenes)
    if impressions is not None:
        # Columns that one side lacks are zero there: nothing of it happened at those moments.
        seen = _impression_moments(impressions, manifest.label_delay_us)
        moments = moments.mutate(impressions=ibis.literal(0.0), clicks=ibis.literal(0.0))
        nothing = {c: ibis.literal(0.0) for c in moments.columns if c not in seen.columns}
        both = moments.union(seen.mutate(**nothing).select(*moments.columns))
        sums = {c: both[c].sum() for c in moments.columns[2:]}
        moments = both.group_by("user_id", "event_timestamp").agg(**sums)
    moments = moments.mutate(
        seconds=moments.event_timestamp.truncate("s").epoch_seconds().cast("float64")
    )
    features = {}
    for scene in scenes:
        features.update(_scene_features(moments, scene))
    if impressions is not None:
        features.update(_click_features(moments))
    readable = ibis.interval(microseconds=manifest.availability_delay_us)
    return moments.select("user_id", event_timestamp=moments.event_timestamp + readable, **features)


def _event_moments(events: Any, scenes: tuple[str, ...]) -> Any:
    """Per user and distinct time and scene: behaviours, those never seen before, those repeated."""
    same = ["user_id", "scene", "behavior_id"]
    nth = ibis.row_number().over(
        ibis.window(group_by=same, order_by=["event_timestamp", "item_key"])
    )
    first_time = events.event_timestamp.min().over(ibis.window(group_by=same))
    marked = events.mutate(is_new=nth == 0, is_repeat=events.event_timestamp > first_time)
    counts = {}
    for scene in scenes:
        here = marked.scene == scene
        counts[f"{scene}_events"] = marked.count(where=here)
        counts[f"{scene}_new"] = marked.count(where=here & marked.is_new)
        counts[f"{scene}_repeats"] = marked.count(where=here & marked.is_repeat)
    # Sums of int64 are 128 bits wide on DuckDB: counts are float64 from here on.
    counts = {name: count.cast("float64") for name, count in counts.items()}
    return marked.group_by("user_id", "event_timestamp").agg(**counts)


def _impression_moments(impressions: Any, label_delay_us: int) -> Any:
    """Per user and time at which clicks are known: impressions and clicks."""
    known = impressions.event_timestamp + ibis.interval(microseconds=label_delay_us)
    return (
        impressions.select("user_id", "clicked", event_timestamp=known)
        .group_by("user_id", "event_timestamp")
        .agg(
            impressions=lambda t: t.count().cast("float64"),
            clicks=lambda t: t.clicked.cast("float64").sum(),
        )
    )


def _so_far() -> Any:
    return ibis.window(group_by="user_id", order_by="event_timestamp", preceding=None, following=0)


def _last_days(days: int) -> Any:
    """Window from exactly ``days`` days before a row up to it, both ends included."""
    return ibis.range_window(
        group_by="user_id",
        order_by="event_timestamp",
        preceding=ibis.interval(days=days),
        following=0,
    )


def _scene_features(moments: Any, scene: str) -> dict[str, Any]:
    events = moments[f"{scene}_events"]
    total = events.sum().over(_so_far())
    seconds = ibis.ifelse(events > 0, moments.seconds, None)
    first, last = seconds.min().over(_so_far()), seconds.max().over(_so_far())
    gaps = ibis.ifelse(events > 0, 1.0, 0.0).sum().over(_so_far()) - 1
    counts = {
        f"{scene}_count_{days}d": events.sum().over(_last_days(days)).cast("float32")
        for days in COUNT_WINDOWS_DAYS
    }
    new = moments[f"{scene}_new"].sum().over(_so_far())
    repeats = moments[f"{scene}_repeats"].sum().over(_so_far())
    return {
        **counts,
        f"{scene}_distinct_rate": (new / total.nullif(0)).cast("float32"),
        f"{scene}_repeat_rate": (repeats / total.nullif(0)).cast("float32"),
        f"{scene}_last_time": last,
        f"{scene}_first_time": first,
        f"{scene}_days_between": ibis.ifelse(gaps > 0, (last - first) / DAY_S / gaps, None).cast(
            "float32"
        ),
    }


def _click_features(moments: Any) -> dict[str, Any]:
    impressions, clicks = moments.impressions, moments.clicks
    return click_features(
        impressions.sum().over(_so_far()),
        clicks.sum().over(_so_far()),
        impressions.sum().over(_last_days(CLICK_WINDOW_DAYS)),
        clicks.sum().over(_last_days(CLICK_WINDOW_DAYS)),
    )


def _scene_fields(scene: str) -> tuple[FeatureField, ...]:
    here = f"in the scene {scene!r}"
    return (
        *(
            FeatureField(
                f"{scene}_count_{days}d",
                "float32",
                f"behaviours {here} in the {days} days up to the user's last change; a count",
            )
            for days in COUNT_WINDOWS_DAYS
        ),
        FeatureField(
            f"{scene}_distinct_rate",
            "float32",
            f"distinct behaviours {here} / all behaviours {here}; a share of 1, null without any",
        ),
        FeatureField(
            f"{scene}_repeat_rate",
            "float32",
            f"behaviours {here} that the user had at an earlier time / all of them; a share of 1, "
            "null without any",
        ),
        FeatureField(
            f"{scene}_last_time",
            "float64",
            f"time of the last behaviour {here}; epoch seconds, rounded down, null without any",
        ),
        FeatureField(
            f"{scene}_first_time",
            "float64",
            f"time of the first behaviour {here}; epoch seconds, rounded down, null without any",
        ),
        FeatureField(
            f"{scene}_days_between",
            "float32",
            f"mean gap between distinct times {here}; days, null with fewer than two times",
        ),
    )


class _BucketedImpressions:
    """Logged impressions with the bucket of their user, loaded into the engine when first needed.

    Args:
        path: Parquet file with user_id, event_timestamp, clicked.
        num_buckets: Buckets of the events.
    """

    TABLE = "bucketed_impressions"

    def __init__(self, path: Path, num_buckets: int) -> None:
        self.path = path
        self.num_buckets = num_buckets
        self.loaded = False

    def of_bucket(self, connection: Any, bucket: int) -> Any:
        """Return the impressions of the users of one bucket: an ibis table."""
        if not self.loaded:
            self._load(connection)
            self.loaded = True
        table = connection.table(self.TABLE)
        return table.filter(table.bucket == bucket).drop("bucket")

    def _load(self, connection: Any) -> None:
        """Copy batch by batch; the engine writes to disk what does not fit its memory."""
        columns = ["user_id", "event_timestamp", "clicked"]
        file = pq.ParquetFile(self.path)
        # A column that the file declares free of nulls would refuse the engine's insert.
        fields = [file.schema_arrow.field(name).with_nullable(True) for name in columns]
        table = pa.schema([*fields, ("bucket", pa.int64())])
        connection.create_table(self.TABLE, schema=ibis.Schema.from_pyarrow(table))
        for batch in file.iter_batches(batch_size=_BATCH_SIZE, columns=columns):
            users = batch.column("user_id").dictionary_encode()
            buckets = hash63_array(users.dictionary.to_pylist()) % self.num_buckets
            of_rows = pa.array(buckets).take(users.indices)
            arrays = [*(batch.column(name) for name in columns), of_rows]
            connection.insert(self.TABLE, pa.table(arrays, schema=table))
