"""Daily snapshots of items, as ibis expressions: events and versions to the rows of the view.

Everything is sums of differences: an event adds 1 at the midnight after it and takes 1 away at the
midnight at which it leaves a window; a running sum is the window's count. That is n log n, without
an inequality join, and the midnights at which nothing changes never appear.

Days are whole numbers since the epoch, UTC; the snapshot of a day holds everything before it.
"""

from typing import Any

import ibis

from feature_repo.click_rates import CLICK_WINDOW_DAYS, click_features
from feature_repo.feature_files import DAY_S
from feature_repo.manifest import DataManifest

COUNT_WINDOWS_DAYS = (7, 14, 30, 90)
_UNTIMED_S = DAY_S
"""Ingest dates items whose data set gives no time at the epoch's second day."""


def daily_counts(events: Any) -> Any:
    """Behaviours per item, scene and day, and the users who had their first of them on that day.

    Args:
        events: ibis table of all events of some users.

    Returns:
        ibis table: item_id, scene, day int64, num_events, num_new_users, first_time, last_time
        float64. Tables of other users may be appended.
    """
    named = events.filter(events.item_id.notnull())
    nth = ibis.row_number().over(
        ibis.window(
            group_by=["user_id", "scene", "item_id"], order_by=["event_timestamp", "behavior_id"]
        )
    )
    marked = named.select("item_id", "scene", seconds=_seconds(named.event_timestamp), nth=nth)
    marked = marked.mutate(day=_day(marked.seconds))
    return marked.group_by("item_id", "scene", "day").agg(
        num_events=marked.count().cast("float64"),
        num_new_users=marked.count(where=marked.nth == 0).cast("float64"),
        first_time=marked.seconds.min().cast("float64"),
        last_time=marked.seconds.max().cast("float64"),
    )


def daily_impressions(impressions: Any, label_delay_us: int) -> Any:
    """Impressions and clicks per item and day on which they are known.

    Args:
        impressions: ibis table with item_id, event_timestamp, clicked.
        label_delay_us: Microseconds from an impression to the moment its click is known.

    Returns:
        ibis table: item_id, day int64, impressions, clicks float64.
    """
    known = impressions.event_timestamp + ibis.interval(microseconds=label_delay_us)
    dated = impressions.select("item_id", "clicked", day=_day(_seconds(known)))
    return dated.group_by("item_id", "day").agg(
        impressions=dated.count().cast("float64"), clicks=dated.clicked.cast("float64").sum()
    )


def item_rows(versions: Any, daily: Any, seen: Any | None, manifest: DataManifest) -> Any:
    """Return the rows of the view, without ``created_timestamp``.

    Args:
        versions: ibis table with item_id, event_timestamp, text_id and the data set's columns.
        daily: What :func:`daily_counts` made, for all users.
        seen: What :func:`daily_impressions` made; None where not logged.
        manifest: Scenes, item columns, delays and the last event.

    Returns:
        ibis table: item_id, event_timestamp and the fields. Items without a version have no row.
    """
    scenes = manifest.scenes
    known = versions.select("item_id").distinct()
    changes = _event_changes(daily.semi_join(known, "item_id"), scenes)
    if seen is not None:
        changes += _impression_changes(seen.semi_join(known, "item_id"))
    changes.append(
        versions.select("item_id", source_time=versions.event_timestamp, versions=ibis.literal(1.0))
    )
    names = sorted({name for change in changes for name in change.columns[2:]})
    sums, least, most = _by_aggregate(names)
    first, *others = (_with_all(change, names) for change in changes)
    merged = first.union(*others)
    merged = merged.group_by("item_id", "source_time").agg(
        **{name: merged[name].sum() for name in sums},
        **{name: merged[name].min() for name in least},
        **{name: merged[name].max() for name in most},
    )
    so_far = ibis.window(group_by="item_id", order_by="source_time", preceding=None, following=0)
    running = merged.select(
        "item_id",
        "source_time",
        is_version=merged.versions.fill_null(0.0) > 0,
        # Nothing so far is a count of 0, but no time.
        **{name: merged[name].sum().over(so_far).fill_null(0.0) for name in sums},
        **{name: merged[name].min().over(so_far) for name in least},
        **{name: merged[name].max().over(so_far) for name in most},
    )
    closed = running.source_time <= ibis.literal(manifest.last_event)
    running = running.filter(running.versions > 0, running.is_version | closed)
    numbered = running.mutate(version=running.versions.cast("int64"))
    rows = numbered.join(_numbered(versions), ["item_id", "version"])
    return rows.select(
        "item_id",
        "text_id",
        *(column.name for column in manifest.item_columns),
        event_timestamp=rows.source_time
        + ibis.interval(microseconds=manifest.availability_delay_us),
        listed_time=ibis.ifelse(rows.listed > _UNTIMED_S, rows.listed, None).cast("float64"),
        **{name: value for scene in scenes for name, value in _scene_features(rows, scene).items()},
        **(
            click_features(rows.impressions, rows.clicks, rows.recent, rows.recent_clicks)
            if seen is not None
            else {}
        ),
    )


def _seconds(moment: Any) -> Any:
    """Epoch seconds, rounded down."""
    return moment.truncate("s").epoch_seconds().cast("int64")


def _day(seconds: Any) -> Any:
    return (seconds // DAY_S).cast("int64")


def _midnight(day: Any) -> Any:
    return ibis.timestamp("1970-01-01 00:00:00+00:00") + day.as_interval("D")


def _event_changes(daily: Any, scenes: tuple[str, ...]) -> list[Any]:
    """Tell what a day's events change: at the midnight after it and when they leave a window."""
    changes = []
    by_day = daily.group_by("item_id", "day").agg(
        **{
            f"{scene}_{name}": daily[name].sum(where=daily.scene == scene).fill_null(0.0)
            for scene in scenes
            for name in ("num_events", "num_new_users")
        },
        **{f"{scene}_first": daily.first_time.min(where=daily.scene == scene) for scene in scenes},
        **{f"{scene}_last": daily.last_time.max(where=daily.scene == scene) for scene in scenes},
    )
    entered: dict[str, Any] = {}
    for scene in scenes:
        num_events = by_day[f"{scene}_num_events"]
        entered |= {f"{scene}_count_{days}d": num_events for days in COUNT_WINDOWS_DAYS}
        entered |= {
            f"{scene}_count_total": num_events,
            f"{scene}_buyers_total": by_day[f"{scene}_num_new_users"],
            f"{scene}_first_time": by_day[f"{scene}_first"],
            f"{scene}_last_time": by_day[f"{scene}_last"],
        }
    changes.append(by_day.select("item_id", source_time=_midnight(by_day.day + 1), **entered))
    for days in COUNT_WINDOWS_DAYS:
        left = {f"{scene}_count_{days}d": -by_day[f"{scene}_num_events"] for scene in scenes}
        midnight = _midnight(by_day.day + 1 + days)
        changes.append(by_day.select("item_id", source_time=midnight, **left))
    return changes


def _impression_changes(seen: Any) -> list[Any]:
    entered = seen.select(
        "item_id",
        source_time=_midnight(seen.day + 1),
        impressions=seen.impressions,
        clicks=seen.clicks,
        recent=seen.impressions,
        recent_clicks=seen.clicks,
    )
    left = seen.select(
        "item_id",
        source_time=_midnight(seen.day + 1 + CLICK_WINDOW_DAYS),
        recent=-seen.impressions,
        recent_clicks=-seen.clicks,
    )
    return [entered, left]


def _by_aggregate(names: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Split into columns that are summed, of which the least counts, of which the most counts."""
    least = [name for name in names if name.endswith("_first_time")]
    most = [name for name in names if name.endswith("_last_time")]
    return [name for name in names if name not in {*least, *most}], least, most


def _with_all(change: Any, names: list[str]) -> Any:
    """Give a table of changes every column; those that it lacks are null."""
    values = {
        name: (change[name] if name in change.columns else ibis.null("float64")).cast("float64")
        for name in names
    }
    # Otherwise moments that were computed and those from a file differ in their declared precision.
    moment = change.source_time.cast("timestamp('UTC', 6)")
    return change.select("item_id", source_time=moment, **values)


def _numbered(versions: Any) -> Any:
    """Versions with their number, from 1, and the time of the item's first one."""
    by_time = ibis.window(group_by="item_id", order_by="event_timestamp")
    whole = ibis.window(group_by="item_id")
    return versions.mutate(
        version=(ibis.row_number().over(by_time) + 1).cast("int64"),
        listed=_seconds(versions.event_timestamp).min().over(whole),
    ).drop("event_timestamp")


def _scene_features(rows: Any, scene: str) -> dict[str, Any]:
    counts = {
        name: rows[name].cast("float32")
        for name in (
            *(f"{scene}_count_{days}d" for days in COUNT_WINDOWS_DAYS),
            f"{scene}_count_total",
            f"{scene}_buyers_total",
        )
    }
    week, month = rows[f"{scene}_count_7d"], rows[f"{scene}_count_30d"]
    return {
        **counts,
        f"{scene}_trend": ((week + 1) / (month * 7 / 30 + 1)).ln().cast("float32"),
        f"{scene}_first_time": rows[f"{scene}_first_time"],
        f"{scene}_last_time": rows[f"{scene}_last_time"],
    }
