"""Small canonical tables, as ingest writes them, and what was built from them, as plain Python."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from feature_repo.behavior import hash63, item_key
from feature_repo.home import Home
from feature_repo.manifest import DataManifest, ItemColumn, Split

SECOND = 1_000_000
HOUR = 3600 * SECOND
DAY = 24 * HOUR
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TIME = pa.timestamp("us", tz="UTC")


class Event(NamedTuple):
    user: str
    time: int  # epoch microseconds
    scene: str
    behavior: int
    item: str | None = None


class Version(NamedTuple):
    item: str
    time: int
    text: int
    price: float | None = None
    brand: str | None = None


class Impression(NamedTuple):
    user: str
    item: str
    time: int
    clicked: int


def moment(time: int) -> datetime:
    return EPOCH + timedelta(microseconds=time)


def micros(time: datetime) -> int:
    return (time - EPOCH) // timedelta(microseconds=1)


def event_table(events: Sequence[Event]) -> pa.Table:
    rows = sorted(events, key=lambda e: (*e[:4], item_key(e.item)))
    return pa.table(
        {
            "user_id": pa.array([e.user for e in rows], pa.string()),
            "event_timestamp": pa.array([e.time for e in rows], TIME),
            "scene": pa.array([e.scene for e in rows], pa.string()),
            "behavior_id": pa.array([e.behavior for e in rows], pa.int64()),
            "item_id": pa.array([e.item for e in rows], pa.string()),
            "item_key": pa.array([item_key(e.item) for e in rows], pa.int64()),
        }
    )


def version_table(versions: Sequence[Version]) -> pa.Table:
    return pa.table(
        {
            "item_id": pa.array([v.item for v in versions], pa.string()),
            "event_timestamp": pa.array([v.time for v in versions], TIME),
            "text_id": pa.array([v.text for v in versions], pa.int64()),
            "price": pa.array([v.price for v in versions], pa.float32()),
            "brand": pa.array([v.brand for v in versions], pa.string()),
        }
    )


def impression_table(impressions: Sequence[Impression]) -> pa.Table:
    count = len(impressions)
    return pa.table(
        {
            "request_id": pa.array([str(n) for n in range(count)], pa.string()),
            "user_id": pa.array([i.user for i in impressions], pa.string()),
            "item_id": pa.array([i.item for i in impressions], pa.string()),
            "event_timestamp": pa.array([i.time for i in impressions], TIME),
            "clicked": pa.array([i.clicked for i in impressions], pa.int8()),
            "split": pa.array(["train"] * count, pa.string()),
        }
    )


def make_manifest(
    events: Sequence[Event],
    scenes: Sequence[str],
    *,
    impressions: Literal["logged", "sampled", "none"] = "none",
    delay: int = 1,
    label_delay: int = 0,
    num_buckets: int = 1,
    length: int = 100,
) -> DataManifest:
    times = [e.time for e in events]
    return DataManifest(
        dataset="tiny",
        scenes=tuple(scenes),
        item_columns=(
            ItemColumn(name="price", kind="numeric"),
            ItemColumn(name="brand", kind="categorical"),
        ),
        context_columns=(),
        impressions=impressions,
        negatives=None,
        split=Split(valid=moment(max(times)), test=moment(max(times))),
        replay=True,
        lowercase=True,
        availability_delay_us=delay,
        label_delay_us=label_delay,
        num_events=len(events),
        num_users=len({e.user for e in events}),
        num_items=0,
        num_behaviors=0,
        num_impressions=0,
        num_rejected=0,
        first_event=moment(min(times)),
        last_event=moment(max(times)),
        sequence_length=length,
        num_buckets=num_buckets,
        source_fingerprint="",
    )


def write_tables(
    root: Path,
    events: Sequence[Event],
    manifest: DataManifest,
    *,
    versions: Sequence[Version] = (),
    impressions: Sequence[Impression] = (),
) -> Home:
    """The tables of a home folder, replaced."""
    home = Home(root)
    home.events.mkdir(parents=True, exist_ok=True)
    for bucket in range(manifest.num_buckets):
        inside = [e for e in events if hash63(e.user) % manifest.num_buckets == bucket]
        pq.write_table(event_table(inside), home.events / f"part-{bucket:05d}.parquet")
    pq.write_table(version_table(versions), home.items)
    table = impression_table(impressions)
    # DuckDB, which writes the real file, declares columns without nulls as such.
    not_null = pa.schema([field.with_nullable(False) for field in table.schema])
    pq.write_table(table.cast(not_null), home.impressions)
    manifest.save(home.manifest)
    return home


def plain(table: pa.Table, entity: str) -> dict[tuple[str, int], dict[str, Any]]:
    """``{(entity, readable from, epoch microseconds): features}``; no key may come twice."""
    rows = {}
    for row in table.to_pylist():
        key = (row.pop(entity), micros(row.pop("event_timestamp")))
        assert key not in rows, f"two rows of {key}"
        rows[key] = row
    return rows


def view_rows(home: Home, view: str, entity: str) -> dict[tuple[str, int], dict[str, Any]]:
    """All rows of the files of a view; asserts that ``created_timestamp`` is the event's."""
    tables = [pq.read_table(path) for path in sorted(home.view(view).glob("*.parquet"))]
    table = pa.concat_tables(tables, promote_options="default")  # nullability may differ
    assert table["created_timestamp"].equals(table["event_timestamp"])
    return plain(table.drop_columns(["created_timestamp"]), entity)


def computed(connection: Any, rows: Any, entity: str) -> dict[tuple[str, int], dict[str, Any]]:
    """The rows of an ibis table."""
    return plain(connection.to_pyarrow(rows), entity)


def relation(table: pa.Table) -> Any:
    """An ibis table of given rows."""
    return ibis.memtable(table)
