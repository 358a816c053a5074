"""The last N behaviours: against a plain oracle, without the future, resumed and extended."""

from typing import Any

import ibis
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_repo.behavior import item_key
from feature_repo.errors import LongtrailError, MissingStepError
from feature_repo.fields import arrow_schema
from feature_repo.home import Home
from feature_repo.progress import silent
from feature_repo.sequences import VIEW, build_sequences, fields, sequence_rows
from tests.feature_repo.event_tables import (
    DAY,
    HOUR,
    SECOND,
    Event,
    computed,
    event_table,
    make_manifest,
    moment,
    relation,
    view_rows,
    write_tables,
)

SCENES = ("cart", "purchase", "search")
START = 1_600_000_000 * SECOND
LARGE = 2**62 + 12345  # not representable as float64

event = st.builds(
    Event,
    user=st.sampled_from(["ann", "bob"]),
    # Steps of 0.4 s: equal times, equal seconds and different seconds all occur.
    time=st.integers(0, 12).map(lambda n: START + n * 400_000),
    scene=st.sampled_from(SCENES),
    behavior=st.sampled_from([1, 2, LARGE, LARGE + 1]),
    item=st.sampled_from([None, "i1", "i2"]),
)
histories = st.lists(event, min_size=1, max_size=60, unique=True) | st.lists(
    event, min_size=30, max_size=60, unique=True
)
lengths = st.integers(1, 4)


def oracle(
    events: list[Event], length: int, delay: int = 1
) -> dict[tuple[str, int], dict[str, Any]]:
    rows = {}
    for user, time in {(e.user, e.time) for e in events}:
        row: dict[str, Any] = {}
        for scene in SCENES:
            past = sorted(
                (e.time, e.behavior, item_key(e.item))
                for e in events
                if e.user == user and e.scene == scene and e.time <= time
            )
            kept = past[-length:]
            row[f"{scene}_behavior_ids"] = [behavior for _, behavior, _ in kept]
            row[f"{scene}_item_keys"] = [key for _, _, key in kept]
            row[f"{scene}_timestamps"] = [t // SECOND for t, _, _ in kept]
            row[f"{scene}_total"] = len(past)
        rows[user, time + delay] = row
    return rows


def shop(num_users: int = 12, num_times: int = 9) -> list[Event]:
    """Fixed events with ties, several scenes and more than N behaviours."""
    return [
        Event(
            f"u{user}", START + step * HOUR, SCENES[(user + step + tie) % 3], 7 * step + tie, item
        )
        for user in range(num_users)
        for step in range(1, num_times + user % 3)
        for tie, item in ((1, "i1"), (2, None))
    ]


@pytest.fixture(scope="module")
def engine() -> Any:
    return ibis.duckdb.connect(threads=1)


def rows_of(engine: Any, events: list[Event], length: int, **more: Any) -> dict[Any, Any]:
    table = relation(event_table(events))
    options = {"delay_us": 1, **more}
    return computed(engine, sequence_rows(table, SCENES, length=length, **options), "user_id")


@settings(max_examples=14, deadline=None, derandomize=True)
@given(events=histories, length=lengths, delay=st.sampled_from([1, HOUR, DAY]))
def test_rows_equal_the_oracle(engine: Any, events: list[Event], length: int, delay: int) -> None:
    assert rows_of(engine, events, length, delay_us=delay) == oracle(events, length, delay)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(events=histories, length=lengths, cut=st.integers(0, 12))
def test_later_events_change_no_earlier_row(
    engine: Any, events: list[Event], length: int, cut: int
) -> None:
    last = START + cut * 400_000
    before = [e for e in events if e.time <= last] or [events[0]._replace(time=last)]
    later = [e for e in events if e.time > last]
    earlier_rows = rows_of(engine, before, length)
    all_rows = rows_of(engine, before + later, length)
    assert {key: row for key, row in all_rows.items() if key[1] <= last + 1} == earlier_rows


@settings(max_examples=8, deadline=None, derandomize=True)
@given(events=histories, length=lengths, cut=st.integers(-1, 12))
def test_rows_after_a_moment_equal_those_of_all_rows(
    engine: Any, events: list[Event], length: int, cut: int
) -> None:
    after = START + cut * 400_000
    expected = {key: row for key, row in oracle(events, length).items() if key[1] - 1 > after}
    assert rows_of(engine, events, length, after=moment(after)) == expected


def test_long_history_crosses_many_chunks(engine: Any) -> None:
    events = [Event("ann", START + n // 3 * SECOND, "search", n + 1) for n in range(700)]
    assert rows_of(engine, events, 10) == oracle(events, 10)
    after = START + 200 * SECOND
    late = {key: row for key, row in oracle(events, 10).items() if key[1] - 1 > after}
    assert rows_of(engine, events, 10, after=moment(after)) == late


def test_expression_compiles_for_postgres() -> None:
    types = {
        "user_id": "string",
        "event_timestamp": "timestamp('UTC', 6)",
        "scene": "string",
        "behavior_id": "int64",
        "item_key": "int64",
    }
    rows = sequence_rows(
        ibis.table(types, name="events"), SCENES, length=100, delay_us=1, after=moment(START)
    )
    assert "search_behavior_ids" in str(ibis.to_sql(rows, dialect="postgres"))


def test_files_have_the_declared_columns_and_rows(tmp_path: Any) -> None:
    events = shop()
    manifest = make_manifest(events, SCENES, delay=HOUR, num_buckets=4, length=3)
    home = write_tables(tmp_path, events, manifest)
    done: list[tuple[int, int]] = []
    summary = build_sequences(home, manifest, lambda n, total, **_: done.append((n, total)))
    expected = oracle(events, 3, HOUR)
    assert view_rows(home, VIEW, "user_id") == expected
    assert (summary.num_rows, summary.num_new_rows) == (len(expected), len(expected))
    assert summary.num_buckets_built == 4
    assert sum(n for n, _ in done) == len(events)
    assert {total for _, total in done} == {len(events)}
    schema = arrow_schema("user_id", fields(manifest))
    for path in home.view(VIEW).glob("*.parquet"):
        written = pq.read_schema(path)
        assert written.names == schema.names
        assert written.types == schema.types
        metadata = pq.read_metadata(path)
        assert metadata.row_group(0).column(0).compression == "ZSTD"


def stamps(home: Home, view: str) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in home.view(view).iterdir()}


def test_unchanged_events_write_nothing(tmp_path: Any) -> None:
    events = shop()
    manifest = make_manifest(events, SCENES, num_buckets=2)
    home = write_tables(tmp_path, events, manifest)
    build_sequences(home, manifest, silent)
    before = stamps(home, VIEW)
    write_tables(tmp_path, events, manifest)  # the same rows in new files
    summary = build_sequences(home, manifest, silent)
    assert (summary.num_new_rows, summary.num_buckets_built) == (0, 0)
    assert summary.num_rows == len(oracle(events, 100))
    assert stamps(home, VIEW) == before


def test_new_events_extend_and_equal_a_full_build(tmp_path: Any) -> None:
    events = shop()
    watermark = START + 5 * HOUR
    old = [e for e in events if e.time <= watermark]
    home = write_tables(tmp_path, old, make_manifest(old, SCENES, num_buckets=2))
    build_sequences(home, make_manifest(old, SCENES, num_buckets=2, length=3), silent)
    before = stamps(home, VIEW)

    manifest = make_manifest(events, SCENES, num_buckets=2, length=3)
    write_tables(tmp_path, events, manifest)
    summary = build_sequences(home, manifest, silent)
    expected = oracle(events, 3)
    assert view_rows(home, VIEW, "user_id") == expected
    assert summary.num_new_rows == len(expected) - len(oracle(old, 3))
    assert summary.num_rows == len(expected)
    after = stamps(home, VIEW)
    assert all(after[name] == t for name, t in before.items() if name.endswith(".parquet"))
    assert sorted(name for name in after.keys() - before.keys()) == [
        "part-00000-0001.parquet",
        "part-00001-0001.parquet",
    ]


def test_changed_past_replaces_the_files_of_its_bucket_only(tmp_path: Any) -> None:
    events = shop()
    old = [e for e in events if e.time <= START + 5 * HOUR]
    manifest = make_manifest(events, SCENES, num_buckets=2)
    home = write_tables(tmp_path, old, manifest)
    build_sequences(home, manifest, silent)
    write_tables(tmp_path, events, manifest)
    build_sequences(home, manifest, silent)
    before = stamps(home, VIEW)

    # One event of the past is gone; later ones make the bucket larger than it was.
    late = [events[3]._replace(time=START + step * DAY) for step in (2, 3)]
    changed = [e for e in events if e != events[3]] + late
    write_tables(tmp_path, changed, manifest)
    summary = build_sequences(home, manifest, silent)
    assert summary.num_buckets_built == 1
    assert view_rows(home, VIEW, "user_id") == oracle(changed, 100)
    same = {name for name, t in stamps(home, VIEW).items() if before.get(name) == t}
    assert len(same) == 3  # two files and the state of the other bucket
    assert len(list(home.view(VIEW).glob("*.parquet"))) == 3


def test_other_settings_rebuild_everything(tmp_path: Any) -> None:
    events = shop()
    manifest = make_manifest(events, SCENES, num_buckets=4, length=2)
    home = write_tables(tmp_path, events, manifest)
    build_sequences(home, manifest, silent)
    longer = manifest.model_copy(update={"sequence_length": 3})
    assert build_sequences(home, longer, silent).num_buckets_built == 4
    assert view_rows(home, VIEW, "user_id") == oracle(events, 3)
    # Fewer buckets: users move, the files of the others go.
    for path in home.events.iterdir():
        path.unlink()
    fewer = make_manifest(events, SCENES, num_buckets=2, length=3)
    write_tables(tmp_path, events, fewer)
    build_sequences(home, fewer, silent)
    assert view_rows(home, VIEW, "user_id") == oracle(events, 3)


def test_another_column_rebuilds_everything(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    events = shop()
    manifest = make_manifest(events, SCENES, num_buckets=4)
    home = write_tables(tmp_path, events, manifest)
    build_sequences(home, manifest, silent)
    assert build_sequences(home, manifest, silent).num_buckets_built == 0
    *others, last = fields(manifest)
    monkeypatch.setattr("feature_repo.sequences.fields", lambda _manifest: tuple(others))
    assert build_sequences(home, manifest, silent).num_buckets_built == 4
    for path in home.view(VIEW).glob("*.parquet"):
        assert last.name not in pq.read_schema(path).names


def test_killed_build_resumes_after_the_finished_buckets(tmp_path: Any) -> None:
    events = shop()
    manifest = make_manifest(events, SCENES, num_buckets=4)
    home = write_tables(tmp_path, events, manifest)

    class Killed(BaseException):
        pass

    def kill(advance: int, total: int, **figures: float) -> None:
        raise Killed

    with pytest.raises(Killed):
        build_sequences(home, manifest, kill)
    before = stamps(home, VIEW)
    assert set(before) == {"part-00000.parquet", "state-00000.json"}
    # What kill -9 leaves: a half file, and a finished file whose state was not written yet.
    (home.view(VIEW) / "part-00001.parquet.part").write_bytes(b"half")
    (home.view(VIEW) / "part-00000-0001.parquet").write_bytes(b"without state")
    summary = build_sequences(home, manifest, silent)
    assert summary.num_buckets_built == 3
    assert view_rows(home, VIEW, "user_id") == oracle(events, 100)
    assert before.items() <= stamps(home, VIEW).items()
    assert not list(home.view(VIEW).glob("*.part"))


def test_buckets_without_events_are_empty_files(tmp_path: Any) -> None:
    events = shop(num_users=1)
    manifest = make_manifest(events, SCENES, num_buckets=4)
    home = write_tables(tmp_path, events, manifest)
    build_sequences(home, manifest, silent)
    assert view_rows(home, VIEW, "user_id") == oracle(events, 100)
    assert len(list(home.view(VIEW).glob("*.parquet"))) == 4
    assert build_sequences(home, manifest, silent).num_buckets_built == 0
    more = [*events, *(e._replace(user=f"new{n}") for n, e in enumerate(events))]
    write_tables(tmp_path, more, manifest)
    build_sequences(home, manifest, silent)
    assert view_rows(home, VIEW, "user_id") == oracle(more, 100)


def test_lost_file_is_built_again(tmp_path: Any) -> None:
    events = shop()
    manifest = make_manifest(events, SCENES, num_buckets=2)
    home = write_tables(tmp_path, events, manifest)
    build_sequences(home, manifest, silent)
    (home.view(VIEW) / "part-00001.parquet").unlink()
    assert build_sequences(home, manifest, silent).num_buckets_built == 1
    assert view_rows(home, VIEW, "user_id") == oracle(events, 100)


def test_many_additions_become_one_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feature_repo.feature_files.MAX_ADDITIONS", 2)
    events = shop(num_users=3)
    files = []
    for step in range(4, 9):
        part = [e for e in events if e.time <= START + step * HOUR]
        manifest = make_manifest(part, SCENES)
        home = write_tables(tmp_path, part, manifest)
        build_sequences(home, manifest, silent)
        files.append(len(list(home.view(VIEW).glob("*.parquet"))))
        assert view_rows(home, VIEW, "user_id") == oracle(part, 100)
    assert files == [1, 2, 3, 1, 2]


def test_mistakes_have_their_sentence(tmp_path: Any) -> None:
    events = shop(num_users=1)
    manifest = make_manifest(events, SCENES)
    with pytest.raises(MissingStepError, match="run `longtrail ingest` first"):
        build_sequences(Home(tmp_path / "empty"), manifest, silent)
    home = write_tables(tmp_path, events, manifest)
    with home.lock(VIEW), pytest.raises(LongtrailError, match="another process is writing"):
        build_sequences(home, manifest, silent)
