"""User statistics: against a plain oracle, with and without logged impressions."""

from typing import Any

import ibis
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_repo.fields import arrow_schema
from feature_repo.progress import silent
from feature_repo.user_stats import VIEW, build_user_stats, fields, user_rows
from tests.feature_repo.event_tables import (
    DAY,
    HOUR,
    SECOND,
    Event,
    Impression,
    computed,
    event_table,
    impression_table,
    make_manifest,
    relation,
    view_rows,
    write_tables,
)

SCENES = ("purchase", "search")
START = 1_600_000_000 * SECOND
STEP = 84 * HOUR  # two steps are a week: events lie exactly on the edge of the windows

event = st.builds(
    Event,
    user=st.sampled_from(["ann", "bob"]),
    time=(st.integers(0, 6) | st.integers(0, 120)).map(
        lambda n: START + n * STEP + n % 3 * 250_000 * (n % 2)
    ),
    scene=st.sampled_from(SCENES),
    behavior=st.sampled_from([1, 2, 2**62 + 1]),
    item=st.sampled_from([None, "i1", "i2"]),
)
impression = st.builds(
    Impression,
    user=st.sampled_from(["ann", "cy"]),
    item=st.just("i1"),
    time=st.integers(0, 120).map(lambda n: START + n * STEP),
    clicked=st.integers(0, 1),
)
histories = st.lists(event, min_size=1, max_size=40, unique=True)
logs = st.lists(impression, max_size=12)


def share(part: int, whole: int) -> float | None:
    return float(np.float32(part / whole)) if whole else None


def scene_oracle(past: list[Event], now: int, scene: str) -> dict[str, Any]:
    """Features of one user and scene; ``past`` are the user's events up to ``now``."""
    here = [e for e in past if e.scene == scene]
    times = sorted({e.time for e in here})
    seconds = [t // SECOND for t in times]
    repeats = [e for e in here if any(o.behavior == e.behavior and o.time < e.time for o in here)]
    gap_days = None
    if len(times) > 1:
        gap_days = (seconds[-1] - seconds[0]) / 86400 / (len(times) - 1)
    return {
        **{
            f"{scene}_count_{days}d": float(sum(e.time >= now - days * DAY for e in here))
            for days in (7, 30, 90, 365)
        },
        f"{scene}_distinct_rate": share(len({e.behavior for e in here}), len(here)),
        f"{scene}_repeat_rate": share(len(repeats), len(here)),
        f"{scene}_last_time": float(seconds[-1]) if seconds else None,
        f"{scene}_first_time": float(seconds[0]) if seconds else None,
        f"{scene}_days_between": None if gap_days is None else float(np.float32(gap_days)),
    }


def oracle(
    events: list[Event],
    *,
    delay: int = 1,
    impressions: list[Impression] | None = None,
    label_delay: int = 0,
) -> dict[tuple[str, int], dict[str, Any]]:
    known = [(i.user, i.time + label_delay, i.clicked) for i in impressions or ()]
    moments = {(e.user, e.time) for e in events} | {(user, time) for user, time, _ in known}
    rows = {}
    for user, now in moments:
        past = [e for e in events if e.user == user and e.time <= now]
        row: dict[str, Any] = {}
        for scene in SCENES:
            row |= scene_oracle(past, now, scene)
        if impressions is not None:
            seen = [(time, click) for who, time, click in known if who == user and time <= now]
            recent = [(time, click) for time, click in seen if time >= now - 30 * DAY]
            clicks = sum(click for _, click in seen)
            row |= {
                "impression_count": float(len(seen)),
                "click_count": float(clicks),
                "click_rate": share(clicks + 1, len(seen) + 10),
                "impression_count_30d": float(len(recent)),
                "click_count_30d": float(sum(click for _, click in recent)),
            }
        rows[user, now + delay] = row
    return rows


@pytest.fixture(scope="module")
def engine() -> Any:
    return ibis.duckdb.connect(threads=1)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(events=histories, delay=st.sampled_from([1, DAY]))
def test_rows_equal_the_oracle(engine: Any, events: list[Event], delay: int) -> None:
    manifest = make_manifest(events, SCENES, delay=delay)
    rows = user_rows(relation(event_table(events)), None, manifest)
    assert computed(engine, rows, "user_id") == oracle(events, delay=delay)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(events=histories, impressions=logs, label_delay=st.sampled_from([0, HOUR, STEP]))
def test_logged_impressions_equal_the_oracle(
    engine: Any, events: list[Event], impressions: list[Impression], label_delay: int
) -> None:
    manifest = make_manifest(events, SCENES, impressions="logged", label_delay=label_delay)
    rows = user_rows(
        relation(event_table(events)), relation(impression_table(impressions)), manifest
    )
    assert computed(engine, rows, "user_id") == oracle(
        events, impressions=impressions, label_delay=label_delay
    )


@settings(max_examples=8, deadline=None, derandomize=True)
@given(events=histories, impressions=logs, cut=st.integers(0, 120))
def test_later_events_and_labels_change_no_earlier_row(
    engine: Any, events: list[Event], impressions: list[Impression], cut: int
) -> None:
    last = START + cut * STEP + SECOND
    manifest = make_manifest(events, SCENES, impressions="logged", label_delay=HOUR)
    before = [e for e in events if e.time <= last]
    known = [i for i in impressions if i.time + HOUR <= last]

    def rows(events: list[Event], impressions: list[Impression]) -> dict[Any, Any]:
        tables = relation(event_table(events)), relation(impression_table(impressions))
        return computed(engine, user_rows(*tables, manifest), "user_id")

    everything = rows(events, impressions)
    assert {k: row for k, row in everything.items() if k[1] <= last + 1} == rows(before, known)


def shop() -> tuple[list[Event], list[Impression]]:
    events = [
        Event(f"u{user}", START + step * STEP, SCENES[(user + step) % 2], step % 4 + 1, "i1")
        for user in range(12)
        for step in range(6)
    ]
    impressions = [
        Impression(f"u{n % 15}", "i1", START + n * HOUR, int(n % 3 == 0)) for n in range(60)
    ]
    return events, impressions


def test_files_resume_and_rebuild_what_changed(tmp_path: Any) -> None:
    events, impressions = shop()
    options: dict[str, Any] = {"impressions": "logged", "label_delay": HOUR, "num_buckets": 4}
    manifest = make_manifest(events, SCENES, **options)
    home = write_tables(tmp_path, events, manifest, impressions=impressions)

    class Killed(BaseException):
        pass

    def kill(advance: int, total: int, **figures: float) -> None:
        raise Killed

    with pytest.raises(Killed):
        build_user_stats(home, manifest, kill)
    assert build_user_stats(home, manifest, silent).num_buckets_built == 3
    expected = oracle(events, impressions=impressions, label_delay=HOUR)
    assert view_rows(home, VIEW, "user_id") == expected
    schema = arrow_schema("user_id", fields(manifest))
    for path in home.view(VIEW).glob("*.parquet"):
        assert pq.read_schema(path).names == schema.names
        assert pq.read_schema(path).types == schema.types

    stamps = {path: path.stat().st_mtime_ns for path in home.view(VIEW).iterdir()}
    summary = build_user_stats(home, manifest, silent)
    assert (summary.num_rows, summary.num_new_rows) == (len(expected), 0)
    assert {path: path.stat().st_mtime_ns for path in home.view(VIEW).iterdir()} == stamps

    # A later event rebuilds its user's bucket, another impression all of them.
    events.append(Event("u3", START + 400 * DAY, "search", 9))
    write_tables(tmp_path, events, manifest, impressions=impressions)
    assert build_user_stats(home, manifest, silent).num_buckets_built == 1
    impressions.append(Impression("new", "i1", START, 1))
    write_tables(tmp_path, events, manifest, impressions=impressions)
    assert build_user_stats(home, manifest, silent).num_buckets_built == 4
    expected = oracle(events, impressions=impressions, label_delay=HOUR)
    assert view_rows(home, VIEW, "user_id") == expected


@pytest.mark.parametrize("kind", ["sampled", "none"])
def test_only_logged_impressions_are_features(tmp_path: Any, kind: Any) -> None:
    events, impressions = shop()
    manifest = make_manifest(events, SCENES, impressions=kind)
    home = write_tables(tmp_path, events, manifest, impressions=impressions)
    build_user_stats(home, manifest, silent)
    assert view_rows(home, VIEW, "user_id") == oracle(events)
    assert not [field for field in fields(manifest) if "click" in field.name]


def test_expression_compiles_for_postgres() -> None:
    events = relation(event_table([Event("u", START, "search", 1)]))
    seen = relation(impression_table([]))
    manifest = make_manifest([Event("u", START, "search", 1)], SCENES, impressions="logged")
    assert "click_rate" in str(ibis.to_sql(user_rows(events, seen, manifest), dialect="postgres"))
