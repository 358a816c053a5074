"""Parity on both profiles with real servers: what it counts, what it finds, what it writes."""

import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from feature_repo.columns import Columns, Ragged
from feature_repo.home import Home
from feature_repo.live_store import LiveStore
from feature_repo.materialize import materialize
from feature_repo.parity import ViewParity, check_parity, smallest_hashes
from feature_repo.parity_series import METRICS_FILE, parity_runs
from feature_repo.reader import FeatureReader
from longtrail import main
from tests.feature_repo.live_homes import newest_row

VIEWS = {"behavior_embeddings_abc", "item_neighbors", "items", "user_sequences", "user_stats"}


def metrics(home: Home) -> dict[tuple[str, str, str], float]:
    """``{(name, view, profile): value}`` of the Prometheus file."""
    text = (home.metrics / METRICS_FILE).read_text(encoding="utf-8")
    return {
        (sample.name, sample.labels.get("view", ""), sample.labels["profile"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_view_is_compared_and_both_profiles_and_joins_count_the_same(
    home: Home, profile: str
) -> None:
    report = check_parity(home, profile, sample=50)
    assert report.views.keys() == VIEWS
    assert report.mismatches == 0
    assert report.compared_values > 3_000
    assert report.views["user_stats"].num_keys == 31  # and an unknown one
    embedded = check_parity(home, "embedded", sample=50, join="fast")
    for name, view in report.views.items():
        assert asdict(view) == asdict(embedded.views[name])
        assert view.values > 0


def test_a_few_keys_are_the_same_ones_each_time_and_every_view_may_have_none(
    home: Home, profile: str
) -> None:
    few, more = (check_parity(home, profile, sample=sample) for sample in (1, 4))
    for name, view in few.views.items():
        assert view.num_keys in (2, 3)  # item_neighbors does not know every item
        assert 0 <= view.values <= more.views[name].values
        assert not view.wrong


def test_a_wrong_value_a_lost_row_and_one_too_many_are_found(home: Home, profile: str) -> None:
    live = LiveStore.open(home, profile)
    views = {view.name: view for view in live.views}
    # One number of one list; a row that is lost; a row of a user who is gone offline.
    row = newest_row(live, views["user_sequences"], "5")
    place = row.schema.get_field_index("buy_behavior_ids")
    (ids,) = row.column(place).to_pylist()
    ids[2] += 1
    row = row.set_column(place, row.schema.field(place), pa.array([ids], pa.list_(pa.int64())))
    live.writer.write(views["user_sequences"], row)
    live.writer.delete(views["user_stats"], pa.array(["7"]), until=live.now)
    ghost = newest_row(live, views["items"], "P1")
    ghost = ghost.set_column(0, ghost.schema.field(0), pa.array(["ghost"]))
    live.writer.write(views["items"], ghost)

    report = check_parity(home, profile, sample=50)
    assert {name for name, view in report.views.items() if view.wrong} == {
        "user_sequences",
        "user_stats",
        "items",
    }
    sequences = report.views["user_sequences"]
    assert (sequences.mismatches, sequences.missing_online, sequences.missing_offline) == (1, 0, 0)
    assert sequences.differences == [
        {
            "feature": "buy_behavior_ids",
            "key": "5",
            "position": 2,
            "offline": str(ids[2] - 1),
            "online": str(ids[2]),
        }
    ]
    stats, items = report.views["user_stats"], report.views["items"]
    assert (stats.mismatches, stats.missing_online, stats.missing_offline) == (0, 1, 0)
    assert stats.differences[0]["key"] == "7"
    assert (items.mismatches, items.missing_online, items.missing_offline) == (0, 0, 1)
    assert items.differences[0]["key"] == "ghost"

    arguments = ["--home", str(home.root), "--profile", profile, "parity", "--sample", "50"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert told["mismatches"] == report.mismatches == 3
    assert told["views"]["user_stats"]["missing_online"] == 1
    assert "user_sequences: 1 of" in done.stderr
    assert "run `longtrail materialize --full`" in done.stderr
    now = metrics(home)
    assert now["longtrail_parity_mismatches", "user_sequences", profile] == 1
    assert now["longtrail_parity_missing_online", "user_stats", profile] == 1
    assert now["longtrail_parity_missing_offline", "items", profile] == 1

    materialize(home, profile, full=True)
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.stderr
    assert metrics(home)["longtrail_parity_mismatches", "user_sequences", profile] == 0


def test_runs_are_a_series_in_the_home_and_counters_for_prometheus(
    home: Home, profile: str
) -> None:
    before = parity_runs(home)
    report = check_parity(home, profile, sample=3)
    *earlier, run = parity_runs(home)
    assert earlier == before
    assert (run.profile, run.sample, run.join) == (profile, 3, "feast")
    assert sum(view.values for view in run.views.values()) == report.compared_values
    # A line that a full disk cut short stands alone: neither it nor the next one spoils the rest.
    with home.parity_runs.open("a") as series:
        series.write('{"time": "2024-0')
    check_parity(home, profile, sample=3)
    runs = parity_runs(home)
    assert runs[:-1] == [*earlier, run]
    last = runs[-1]
    now = metrics(home)
    compared = sum(run.views["items"].values for run in runs if run.profile == profile)
    assert now["longtrail_parity_values_total", "items", profile] == compared
    assert now["longtrail_parity_keys", "items", profile] == last.views["items"].num_keys
    moment = now["longtrail_parity_last_run_timestamp_seconds", "items", profile]
    assert moment == pytest.approx(last.time.timestamp())
    assert [path.name for path in home.metrics.iterdir()] == [METRICS_FILE]


def test_keys_that_nobody_knows_are_equal_in_every_view(home: Home, profile: str) -> None:
    reader = FeatureReader(home, profile)
    for view in reader.store.list_feature_views():
        is_number = view.entity_columns[0].name == "behavior_id"
        keys = np.array([0] if is_number else ["nobody"], dtype=np.int64 if is_number else object)
        online = reader.online_columns(view.name, keys)
        for join in ("fast", "feast"):
            offline = reader.historical_columns(view.name, keys, reader.request_times(1), join=join)
            parity = ViewParity()
            parity.compare(keys, offline, online)
            assert asdict(parity) == asdict(ViewParity(num_keys=1))
            for name, column in offline.values.items():
                assert type(column) is type(online.values[name]), (view.name, name, join)


def one_view(present: list[bool], **values: object) -> Columns:
    return Columns(np.array(present), values)  # type: ignore[arg-type]


def test_values_are_compared_bit_by_bit_and_lists_element_by_element() -> None:
    nan = np.nan
    keys = np.array(["a", "b", "c", "d"], dtype=object)
    offline = one_view(
        [True, True, True, False],
        rate=np.array([1.0, nan, 0.0, 5.0], dtype=np.float32),
        brand=np.array(["x", None, "z", "?"], dtype=object),
        ids=Ragged(np.array([1, 2, 3, 4, 5, 6]), np.array([2, 1, 3, 0])),
    )
    online = one_view(
        [True, True, True, True],
        rate=np.array([1.0, nan, -0.0, 6.0], dtype=np.float32),
        brand=np.array(["x", None, "y", "!"], dtype=object),
        ids=Ragged(np.array([1, 9, 4, 5]), np.array([2, 0, 2, 0])),
    )
    view = ViewParity()
    view.compare(keys, offline, online)
    # d is missing offline; of the others 3 rates, 3 brands, 2 + 1 + 3 ids.
    assert (view.num_keys, view.missing_offline, view.missing_online) == (4, 1, 0)
    assert view.values == 12
    # -0.0 is not 0.0; z and y; 2 and 9; the lists of b and c have other lengths.
    assert view.mismatches == 1 + 1 + 1 + 1 + 3
    assert view.differences[0]["key"] == "d"
    assert {d["feature"] for d in view.differences} == {"(row)", "rate", "brand", "ids"}


@settings(
    derandomize=True,
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],  # of a busy machine
)
@given(st.lists(st.text(max_size=3), max_size=60), st.integers(1, 10), st.integers(1, 7))
def test_a_sample_does_not_depend_on_batches_or_order(
    keys: list[str], number: int, batch: int
) -> None:
    parts = [keys[start : start + batch] for start in range(0, len(keys), batch)]
    expected = set(smallest_hashes([keys], number))
    assert set(smallest_hashes(reversed(parts), number)) == expected
    assert len(expected) == min(number, len(set(keys)))
    # A key that is not among the smallest changes nothing: the two stores' samples agree.
    without = [key for key in keys if key in expected]
    assert set(smallest_hashes([without], number)) == expected
