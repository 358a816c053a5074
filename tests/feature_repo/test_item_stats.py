"""Daily item snapshots: against a plain oracle at arbitrary times, and only where they change."""

import math
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_repo.errors import DataSetError
from feature_repo.fields import arrow_schema
from feature_repo.item_snapshots import daily_counts, daily_impressions, item_rows
from feature_repo.item_stats import VIEW, build_item_stats, fields
from feature_repo.manifest import DataManifest, ItemColumn
from feature_repo.progress import silent
from tests.feature_repo.event_tables import (
    DAY,
    HOUR,
    SECOND,
    Event,
    Impression,
    Version,
    computed,
    event_table,
    impression_table,
    make_manifest,
    micros,
    relation,
    version_table,
    view_rows,
    write_tables,
)

SCENES = ("purchase", "view")
START = 18_500 * DAY  # a midnight
UNTIMED = DAY  # ingest's time of items without one

hours = st.integers(0, 20 * 24) | st.integers(0, 130).map(lambda day: day * 24)
event = st.builds(
    Event,
    user=st.sampled_from(["ann", "bob", "cy"]),
    time=hours.map(lambda n: START + n * HOUR + n % 7 * 300_000),
    scene=st.sampled_from(SCENES),
    behavior=st.sampled_from([1, 2]),
    item=st.sampled_from([None, "i1", "i2", "unlisted"]),
)
version = st.builds(
    Version,
    item=st.sampled_from(["i1", "i2", "i3"]),
    time=st.just(UNTIMED) | hours.map(lambda n: START + n * HOUR),
    text=st.sampled_from([5, 2**62 + 1]),
    price=st.none() | st.just(2.5),
    brand=st.none() | st.just("acme"),
)
impression = st.builds(
    Impression,
    user=st.just("ann"),
    item=st.sampled_from(["i1", "i3", "unlisted"]),
    time=hours.map(lambda n: START + n * HOUR),
    clicked=st.integers(0, 1),
)
histories = st.lists(event, min_size=1, max_size=25, unique=True)
catalogs = st.lists(version, min_size=1, max_size=6, unique_by=lambda v: (v.item, v.time))
logs = st.lists(impression, max_size=10)


def f32(value: float) -> float:
    return float(np.float32(value))


def oracle(
    item: str,
    now: int,
    events: list[Event],
    versions: list[Version],
    impressions: list[Impression] | None = None,
    label_delay: int = 0,
) -> dict[str, Any] | None:
    """What is known of an item at source time ``now``; None before its first version."""
    listed = sorted(v for v in versions if v.item == item)
    current = [v for v in listed if v.time <= now]
    if not current:
        return None
    midnight = now // DAY * DAY
    row: dict[str, Any] = {
        "text_id": current[-1].text,
        "price": current[-1].price,
        "brand": current[-1].brand,
        "listed_time": None if listed[0].time <= UNTIMED else float(listed[0].time // SECOND),
    }
    past = [e for e in events if e.item == item and e.time < midnight]
    for scene in SCENES:
        here = [e for e in past if e.scene == scene]
        count = {d: sum(e.time >= midnight - d * DAY for e in here) for d in (7, 14, 30, 90)}
        row |= {f"{scene}_count_{days}d": float(n) for days, n in count.items()}
        times = [e.time // SECOND for e in here]
        row |= {
            f"{scene}_count_total": float(len(here)),
            f"{scene}_trend": f32(math.log((count[7] + 1) / (count[30] * 7 / 30 + 1))),
            f"{scene}_buyers_total": float(len({e.user for e in here})),
            f"{scene}_first_time": float(min(times)) if times else None,
            f"{scene}_last_time": float(max(times)) if times else None,
        }
    if impressions is not None:
        known = [
            (i.time + label_delay, i.clicked)
            for i in impressions
            if i.item == item and i.time + label_delay < midnight
        ]
        recent = [click for time, click in known if time >= midnight - 30 * DAY]
        clicks = sum(click for _, click in known)
        row |= {
            "impression_count": float(len(known)),
            "click_count": float(clicks),
            "click_rate": f32((clicks + 1) / (len(known) + 10)),
            "impression_count_30d": float(len(recent)),
            "click_count_30d": float(sum(recent)),
        }
    return row


def same(row: dict[str, Any] | None, expected: dict[str, Any] | None) -> bool:
    """Equal, the logarithm up to its last digit."""
    if row is None or expected is None:
        return row is expected
    if row.keys() != expected.keys():
        return False
    return all(
        math.isclose(row[name], value, rel_tol=1e-6, abs_tol=1e-7)
        if name.endswith("_trend")
        else row[name] == value
        for name, value in expected.items()
    )


def latest(rows: dict[tuple[str, int], Any], item: str, time: int) -> dict[str, Any] | None:
    """What a point-in-time join reads."""
    readable = [moment for entity, moment in rows if entity == item and moment <= time]
    return rows[item, max(readable)] if readable else None


@pytest.fixture(scope="module")
def engine() -> Any:
    return ibis.duckdb.connect(threads=1)


def rows_of(
    engine: Any,
    events: list[Event],
    versions: list[Version],
    manifest: DataManifest,
    impressions: list[Impression] | None = None,
) -> dict[tuple[str, int], dict[str, Any]]:
    seen = None
    if impressions is not None:
        table = relation(impression_table(impressions))
        seen = daily_impressions(table, manifest.label_delay_us)
    rows = item_rows(
        relation(version_table(versions)),
        daily_counts(relation(event_table(events))),
        seen,
        manifest,
    )
    return computed(engine, rows, "item_id")


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    events=histories,
    versions=catalogs,
    impressions=st.none() | logs,
    delays=st.sampled_from([(1, 0), (HOUR, HOUR), (DAY, 3 * DAY)]),
    asked=st.lists(st.integers(-1, 131 * 24 * 4), min_size=20, max_size=20),
)
def test_latest_row_equals_the_oracle_at_any_time(
    engine: Any,
    events: list[Event],
    versions: list[Version],
    impressions: list[Impression] | None,
    delays: tuple[int, int],
    asked: list[int],
) -> None:
    delay, label_delay = delays
    manifest = make_manifest(
        events,
        SCENES,
        impressions="none" if impressions is None else "logged",
        delay=delay,
        label_delay=label_delay,
    )
    rows = rows_of(engine, events, versions, manifest, impressions)
    last = max(e.time for e in events)
    quarters = [START + n * HOUR // 4 for n in asked]
    edges = [moment - delay + shift for _, moment in rows for shift in (-1, 0, 1)]
    for item in ("i1", "i2", "i3", "unlisted"):
        for now in {t for t in (*quarters, *edges, last) if t <= last}:
            expected = oracle(item, now, events, versions, impressions, label_delay)
            assert same(latest(rows, item, now + delay), expected), (item, now)
    # A version after the last event can be read from its own time on.
    for listed in versions:
        assert rows[listed.item, listed.time + delay]["text_id"] == listed.text


@settings(max_examples=10, deadline=None, derandomize=True)
@given(events=histories, versions=catalogs)
def test_there_is_a_snapshot_only_where_something_changes(
    engine: Any, events: list[Event], versions: list[Version]
) -> None:
    rows = rows_of(engine, events, versions, make_manifest(events, SCENES))
    named = {(v.item, v.time) for v in versions}
    last = max(e.time for e in events)
    for item, readable in rows:
        source = readable - 1
        if (item, source) in named:
            continue
        assert source % DAY == 0
        assert source <= last
        ages = {source // DAY - 1 - e.time // DAY for e in events if e.item == item}
        assert ages & {0, 7, 14, 30, 90}


@settings(max_examples=8, deadline=None, derandomize=True)
@given(events=histories, versions=catalogs, cut=st.integers(0, 130 * 24))
def test_later_events_change_no_earlier_row(
    engine: Any, events: list[Event], versions: list[Version], cut: int
) -> None:
    last = START + cut * HOUR
    before = [e for e in events if e.time <= last] or [events[0]._replace(time=last)]
    later = [e for e in events if e.time > last]
    everything = before + later
    early = rows_of(engine, before, versions, make_manifest(before, SCENES))
    late = rows_of(engine, everything, versions, make_manifest(everything, SCENES))
    closed = max(e.time for e in before)
    kept = {key: row for key, row in early.items() if key[1] - 1 <= closed}
    assert {key: row for key, row in late.items() if key[1] - 1 <= closed} == kept


def shop() -> tuple[list[Event], list[Version], list[Impression]]:
    events = [
        Event(f"u{n % 9}", START + n * 5 * HOUR, SCENES[n % 2], n % 5 + 1, f"i{n % 4}")
        for n in range(150)
    ]
    versions = [Version(f"i{n}", UNTIMED, n + 1, n / 2, None) for n in range(4)]
    versions.append(Version("i1", START + 40 * HOUR, 99, 7.0, "acme"))
    impressions = [
        Impression(f"u{n % 9}", f"i{n % 4}", START + n * HOUR, int(n % 3 == 0)) for n in range(50)
    ]
    return events, versions, impressions


def test_files_are_built_once_and_again_after_a_change(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feature_repo.item_stats.DAILY_ROWS_PER_PART", 50)
    events, versions, impressions = shop()
    manifest = make_manifest(events, SCENES, impressions="logged", num_buckets=4)
    home = write_tables(tmp_path, events, manifest, versions=versions, impressions=impressions)
    done: list[tuple[int, int]] = []
    summary = build_item_stats(home, manifest, lambda n, total, **_: done.append((n, total)))
    rows = view_rows(home, VIEW, "item_id")
    last = max(e.time for e in events)
    for item in ("i0", "i1", "i2", "i3"):
        for now in range(START, last, 7 * HOUR):
            expected = oracle(item, now, events, versions, impressions)
            assert same(latest(rows, item, now + 1), expected), (item, now)
    assert summary.num_rows == summary.num_new_rows == len(rows)
    assert sum(n for n, _ in done) == len(events)
    assert {total for _, total in done} == {len(events)}
    schema = arrow_schema("item_id", fields(manifest))
    files = sorted(home.view(VIEW).glob("*.parquet"))
    assert len(files) > 1
    for path in files:
        assert pq.read_schema(path).names == schema.names
        assert pq.read_schema(path).types == schema.types

    stamps = {path: path.stat().st_mtime_ns for path in home.view(VIEW).iterdir()}
    again = build_item_stats(home, manifest, silent)
    assert (again.num_rows, again.num_new_rows) == (len(rows), 0)
    assert {path: path.stat().st_mtime_ns for path in home.view(VIEW).iterdir()} == stamps

    versions.append(Version("new", last + HOUR, 123))
    write_tables(tmp_path, events, manifest, versions=versions, impressions=impressions)
    assert build_item_stats(home, manifest, silent).num_new_rows == len(rows) + 1
    assert view_rows(home, VIEW, "item_id")["new", last + HOUR + 1]["text_id"] == 123


def test_text_ids_stay_exact_beside_nulls(tmp_path: Any) -> None:
    events = [Event("u", START, "view", 1, "i1")]
    manifest = make_manifest(events, SCENES)
    large = 2**62 + 12345
    home = write_tables(tmp_path, events, manifest, versions=[Version("i1", START, large)])
    build_item_stats(home, manifest, silent)
    table = pa.concat_tables(pq.read_table(p) for p in home.view(VIEW).glob("*.parquet"))
    assert table["text_id"].type == pa.int64()
    assert table["text_id"].to_pylist() == [large]
    assert table["view_first_time"].null_count == 1
    assert micros(table["event_timestamp"][0].as_py()) == START + 1


def test_column_with_the_name_of_a_feature_is_refused() -> None:
    manifest = make_manifest([Event("u", START, "view", 1)], SCENES)
    column = ItemColumn(name="view_trend", kind="numeric")
    manifest = manifest.model_copy(update={"item_columns": (column,)})
    with pytest.raises(DataSetError, match=r"\['view_trend'\].*rename them in the SQL"):
        fields(manifest)


def test_every_field_says_its_unit() -> None:
    manifest = make_manifest([Event("u", START, "view", 1)], SCENES, impressions="logged")
    names = [field.name for field in fields(manifest)]
    assert len(names) == len(set(names))
    units = ("count", "share of 1", "epoch seconds", "no unit", "hash", "as it is there")
    assert all(any(unit in field.description for unit in units) for field in fields(manifest))
