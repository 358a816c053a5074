"""User sequences: the last N behaviours per scene, one row per user and distinct event time.

A row holds everything up to and including its source time and can be read from that time plus the
availability delay on, so a point-in-time join never sees the request's own basket.

The expressions are ibis and portable. A history is cut into chunks of N behaviours; the last N
before any moment lie in two neighbouring chunks, found by the running count. That makes it n log n,
without an inequality join and without an array per event.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import ibis

from feature_repo.feature_files import BucketedView, BuildSummary, view_settings
from feature_repo.fields import FeatureField, arrow_schema
from feature_repo.home import Home
from feature_repo.manifest import DataManifest
from feature_repo.progress import Progress

VIEW = "user_sequences"
VERSION = 1
"""Raised whenever the rows change for the same events."""
_LISTS = {"behavior_ids": "behavior_id", "item_keys": "item_key", "timestamps": "seconds"}
"""List per scene -> the event column that it collects."""


def fields(manifest: DataManifest) -> tuple[FeatureField, ...]:
    """Return the fields of the view, in the order of the files."""
    return tuple(field for scene in manifest.scenes for field in _scene_fields(scene))


def build_sequences(
    home: Home,
    manifest: DataManifest,
    progress: Progress,
    *,
    threads: int = 2,
) -> BuildSummary:
    """Bring the files of the view up to date with the events: only what is new is built.

    Args:
        home: Where events are read and features are written.
        manifest: What ingest wrote.
        progress: Receives events done of all events.
        threads: Threads of the query engine.

    Raises:
        MissingStepError: If there are no events.
        LongtrailError: If another process builds the same view.
    """

    def rows(_connection: Any, _bucket: int, events: Any, after: datetime | None) -> Any:
        return sequence_rows(
            events,
            manifest.scenes,
            length=manifest.sequence_length,
            delay_us=manifest.availability_delay_us,
            after=after,
        )

    view = BucketedView(
        folder=home.view(VIEW),
        schema=arrow_schema("user_id", fields(manifest)),
        settings=view_settings(manifest, version=VERSION, length=manifest.sequence_length),
        rows=rows,
        extendable=True,
    )
    return view.build(home, progress, threads=threads)


def sequence_rows(
    events: Any,
    scenes: Sequence[str],
    *,
    length: int,
    delay_us: int,
    after: datetime | None = None,
) -> Any:
    """Return the rows of the view, without ``created_timestamp``.

    Args:
        events: ibis table with user_id, event_timestamp, scene, behavior_id, item_key; no nulls.
        scenes: Scenes in the order of the columns.
        length: N, behaviours kept per scene.
        delay_us: Microseconds from an event to the moment its features can be read.
        after: Only the rows whose source is later than this; the others are not even computed.

    Returns:
        ibis table: user_id, event_timestamp and the fields.
    """
    if after is not None:
        news = events.filter(events.event_timestamp > ibis.literal(after))
        events = events.semi_join(news.select("user_id").distinct(), "user_id")
    points = running_totals(events, scenes)
    if after is not None:
        points = points.filter(points.event_timestamp > ibis.literal(after))
    rows = histories(points, events, scenes, length=length, after=after)
    return rows.mutate(event_timestamp=rows.event_timestamp + ibis.interval(microseconds=delay_us))


def running_totals(events: Any, scenes: Sequence[str]) -> Any:
    """How many behaviours of each scene a user had at each distinct event time, that included.

    Returns:
        ibis table: user_id, event_timestamp and ``<scene>_total`` int64.
    """
    # Sums of int64 are 128 bits wide on DuckDB and ibis drops a cast back: they go through float64.
    counts = events.group_by("user_id", "event_timestamp").agg(
        **{
            f"{scene}_total": events.count(where=events.scene == scene).cast("float64")
            for scene in scenes
        }
    )
    so_far = ibis.window(
        group_by="user_id", order_by="event_timestamp", preceding=None, following=0
    )
    return counts.select(
        "user_id",
        "event_timestamp",
        **{
            f"{scene}_total": counts[f"{scene}_total"].sum().over(so_far).cast("int64")
            for scene in scenes
        },
    )


def histories(
    points: Any,
    events: Any,
    scenes: Sequence[str],
    *,
    length: int,
    after: datetime | None = None,
) -> Any:
    """Find the last ``length`` behaviours of each scene at points given by running totals.

    Args:
        points: ibis table with user_id, ``<scene>_total`` (int64, behaviours of all time) and
            any other columns, which are kept.
        events: ibis table of events.
        scenes: Scenes in the order of the columns.
        length: N.
        after: Earliest moment of the points, where known: older chunks are left out.

    Returns:
        ibis table: the other columns of ``points``, then per scene ``<scene>_behavior_ids``,
        ``<scene>_item_keys``, ``<scene>_timestamps`` and ``<scene>_total``.
    """
    others = [c for c in points.columns if c not in {f"{scene}_total" for scene in scenes}]
    table = points
    for scene in scenes:
        total = table[f"{scene}_total"]
        chunk = ((ibis.greatest(total, 1) - 1) // length).cast("int64")
        pairs = _chunk_pairs(events.filter(events.scene == scene), length, after)
        joined = table.mutate(chunk=chunk).left_join(pairs, ["user_id", "chunk"])
        stop = joined[f"{scene}_total"] - joined.chunk * length + joined.offset
        start = ibis.greatest(stop - length, 0)
        # A literal empty list has no type on PostgreSQL; a user without the scene has no chunk.
        empty = ibis.array([ibis.literal(0, "int64")])[0:0]
        lists = {
            f"{scene}_{name}": ibis.coalesce(joined[f"pair_{name}"][start:stop], empty)
            for name in _LISTS
        }
        table = joined.select(*[joined[c] for c in table.columns], **lists)
    ordered = [field.name for scene in scenes for field in _scene_fields(scene)]
    return table.select(*others, *ordered)


def _chunk_pairs(events: Any, length: int, after: datetime | None) -> Any:
    """Each chunk of one scene behind the chunk before it: user_id, chunk, pair_*, offset.

    ``offset`` is where the chunk itself begins in the pair.
    """
    order = ["event_timestamp", "behavior_id", "item_key"]
    rank = ibis.row_number().over(ibis.window(group_by="user_id", order_by=order))
    numbered = events.mutate(
        rank=rank.cast("int64"),
        # Without truncation DuckDB and PostgreSQL round to the nearest second, Spark floors.
        seconds=events.event_timestamp.truncate("s").epoch_seconds().cast("int64"),
    )
    if after is not None:
        is_old = events.event_timestamp <= ibis.literal(after)
        numbered = numbered.mutate(
            num_old=ibis.ifelse(is_old, 1, None).count().over(ibis.window(group_by="user_id"))
        )
        first = (numbered.num_old // length - 1) * length
        numbered = numbered.filter(numbered["rank"] >= first)
    numbered = numbered.mutate(chunk=(numbered["rank"] // length).cast("int64"))
    # An ordered aggregate does not exist on Spark: collect over a window, keep one row per chunk.
    whole = ibis.window(
        group_by=["user_id", "chunk"], order_by="rank", preceding=None, following=None
    )
    collected = numbered.mutate(
        **{name: numbered[column].collect().over(whole) for name, column in _LISTS.items()}
    )
    chunks = collected.filter(collected["rank"] == collected.chunk * length).select(
        "user_id", "chunk", *_LISTS
    )
    before = chunks.select(
        "user_id", chunk=chunks.chunk + 1, **{f"before_{name}": chunks[name] for name in _LISTS}
    )
    joined = chunks.left_join(before, ["user_id", "chunk"])
    alone = joined.before_timestamps.isnull()
    return joined.select(
        "user_id",
        "chunk",
        offset=ibis.ifelse(alone, 0, length).cast("int64"),
        **{
            f"pair_{name}": ibis.ifelse(
                alone, joined[name], joined[f"before_{name}"].concat(joined[name])
            )
            for name in _LISTS
        },
    )


def _scene_fields(scene: str) -> tuple[FeatureField, ...]:
    last = f"of the last behaviours in the scene {scene!r}, oldest first"
    return (
        FeatureField(f"{scene}_behavior_ids", "int64_list", f"63-bit hashes of the texts {last}"),
        FeatureField(
            f"{scene}_item_keys",
            "int64_list",
            f"63-bit hashes of the item ids {last}; 0 where the event names no item",
        ),
        FeatureField(
            f"{scene}_timestamps", "int64_list", f"times {last}; epoch seconds, rounded down"
        ),
        FeatureField(
            f"{scene}_total", "int64", f"behaviours of all time in the scene {scene!r}; a count"
        ),
    )
