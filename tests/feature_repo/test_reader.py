"""The heart: training and serving read the same, and neither reads the future."""

import sqlite3
from contextlib import closing
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_repo.behavior import behavior_id, item_key
from feature_repo.dataset import load_dataset
from feature_repo.errors import MissingStepError, StoreError
from feature_repo.features import ItemFeatures, UserFeatures
from feature_repo.home import Home
from feature_repo.ingest import ingest
from feature_repo.item_neighbors import build_item_neighbors
from feature_repo.item_stats import build_item_stats
from feature_repo.manifest import EncoderManifest, load_manifest
from feature_repo.materialize import apply, materialize
from feature_repo.online_sqlite import sqlite_errors
from feature_repo.parity import check_parity
from feature_repo.profiles import PROFILES
from feature_repo.progress import silent
from feature_repo.reader import FeatureReader
from feature_repo.sequences import build_sequences
from feature_repo.user_stats import build_user_stats
from feature_repo.view_reader import Join
from tests.feature_repo.conftest import TOML, write_files

BUILDS = (build_sequences, build_user_stats, build_item_stats, build_item_neighbors)
ENCODER = EncoderManifest(
    model="a small stand-in", model_fingerprint="0", split_layer=1, pooling="mean", prompt="{text}",
    normalize=True, dtype="float32", max_tokens=8, width=4, fingerprint="abc",
)  # fmt: skip


def build(home: Home, folder: Path) -> None:
    """Everything from the files in ``folder`` to the online store, vectors from a hash."""
    (folder / "kitchen.toml").write_text(TOML, encoding="utf-8")
    ingest(home, load_dataset(folder / "kitchen.toml", data_dir=folder))
    manifest = load_manifest(home)
    for step in BUILDS:
        step(home, manifest, silent, threads=1)
    behaviors = pq.read_table(home.behaviors)
    ids = behaviors["behavior_id"].to_numpy()
    vectors = np.random.default_rng(0).normal(size=(len(ids), 4)).astype(np.float32)
    times = behaviors["first_seen"].cast(pa.timestamp("us", tz="UTC"))
    target = home.embeddings / ENCODER.fingerprint
    target.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table(
            {
                "behavior_id": ids,
                "embedding": pa.array(list(vectors), pa.list_(pa.float32())),
                "encoder_fingerprint": ["abc"] * len(ids),
                "event_timestamp": times,
                "created_timestamp": times,
            }
        ),
        target / "part-0.parquet",
    )
    ENCODER.save(home.encoder)
    apply(home, "embedded")
    materialize(home, "embedded")


@pytest.fixture(scope="module", params=PROFILES)
def profile(request: pytest.FixtureRequest) -> str:
    """Every profile in turn, all tests of one before those of the next."""
    return str(request.param)


@pytest.fixture(scope="module")
def reader(home: Home, profile: str) -> FeatureReader:
    return FeatureReader(home, profile)


def arrays(features: UserFeatures | ItemFeatures) -> dict[str, Any]:
    """Every array of a reader's answer."""
    found: dict[str, Any] = {}
    for field in fields(features):
        value = getattr(features, field.name)
        if field.name == "sequences":
            for scene, sequence in value.items():
                for part in fields(sequence):
                    found[f"{scene}.{part.name}"] = getattr(sequence, part.name)
        elif field.name == "categorical":
            found |= value
        elif isinstance(value, np.ndarray):
            found[field.name] = value
    return found


def assert_equal(one: UserFeatures | ItemFeatures, two: UserFeatures | ItemFeatures) -> None:
    left, right = arrays(one), arrays(two)
    assert left.keys() == right.keys()
    for name, values in left.items():
        assert values.dtype == right[name].dtype, name
        if values.dtype == object:
            assert values.tolist() == right[name].tolist(), name
        else:
            assert values.tobytes() == right[name].tobytes(), name


def _impressions(home: Home) -> pd.DataFrame:
    return pq.read_table(home.impressions).to_pandas()


def _micros(times: "pd.Series[Any]") -> Any:
    return times.astype("datetime64[us, UTC]").astype(np.int64).to_numpy()


def test_skew_offline_and_online_give_equal_bytes(reader: FeatureReader) -> None:
    now = reader.manifest.now()
    users = np.array([*(str(n) for n in range(30)), "stranger", "0"], dtype=object)
    items = np.array([*(f"P{n}" for n in range(6)), "unknown"], dtype=object)
    times = reader.request_times(len(users))
    online = reader.online_users(users, at=now)
    assert_equal(reader.historical_users(users, times), online)
    assert_equal(reader.historical_users(users, times, join="feast"), online)
    assert online.found.tolist() == [True] * 30 + [False, True]
    assert np.isnan(online.dense[30]).all()
    assert not online.sequences["buy"].mask[30].any()
    times = reader.request_times(len(items))
    assert_equal(reader.historical_items(items, times), reader.online_items(items, at=now))
    assert_equal(
        reader.historical_items(items, times, join="feast"), reader.online_items(items, at=now)
    )
    assert (reader.online_items(items, at=now).neighbor_keys != 0).any(axis=1)[:6].all()


@pytest.mark.parametrize("join", ["fast", "feast"])
def test_what_is_read_in_parts_is_what_is_read_at_once(
    home: Home, profile: str, reader: FeatureReader, join: Join
) -> None:
    rows = _impressions(home).sample(frac=1, random_state=0)
    users, items = rows["user_id"].to_numpy(object), rows["item_id"].to_numpy(object)
    users[::5] = "stranger"
    times = _micros(rows["event_timestamp"])
    in_parts = FeatureReader(home, profile, part_requests=25)
    some = slice(0, 60)
    for ids, of_parts, at_once in (
        (users, in_parts.historical_users, reader.historical_users),
        (items, in_parts.historical_items, reader.historical_items),
    ):
        read = of_parts(ids[some], times[some], join=join)
        assert_equal(read, at_once(ids[some], times[some]))
        assert read.found.any()
        with pytest.raises(ValueError, match="one time per key, got 60 and 59"):
            of_parts(ids[some], times[:59], join=join)


def test_the_fast_join_equals_feasts_value_by_value(
    home: Home, profile: str, reader: FeatureReader
) -> None:
    # Feast's own join takes minutes for all of them in PostgreSQL.
    rows = _impressions(home).iloc[:: {"embedded": 1, "production": 25}[profile]]
    # At, just before and just after the very moments at which something changes.
    parts = [rows.assign(shift=s) for s in (-2, -1, 0, 1)]
    rows = pd.concat(parts, ignore_index=True)
    times = _micros(rows["event_timestamp"]) + rows["shift"].to_numpy()
    users = rows["user_id"].to_numpy(object)
    assert_equal(
        reader.historical_users(users, times), reader.historical_users(users, times, join="feast")
    )
    items = rows["item_id"].to_numpy(object)
    assert_equal(
        reader.historical_items(items, times), reader.historical_items(items, times, join="feast")
    )


def test_count_rows_in_are_rows_out_with_ties_and_duplicates(reader: FeatureReader) -> None:
    users = np.array(["7", "3", "7", "nobody", "3", "7"], dtype=object)
    times = np.full(6, int(datetime(2024, 2, 1, tzinfo=UTC).timestamp() * 1e6))
    times[2] += 86_400_000_000
    for join in ("fast", "feast"):
        read = reader.historical_users(users, times, join=join)
        assert read.user_ids.tolist() == users.tolist()
        assert read.dense[1].tobytes() == read.dense[4].tobytes()
        assert read.found.tolist() == [True, True, True, False, True, True]


def test_a_history_ends_strictly_before_the_request(home: Home, reader: FeatureReader) -> None:
    events = pq.read_table(sorted(home.events.glob("*.parquet"))).to_pandas()
    moments = events[["user_id", "event_timestamp"]].drop_duplicates()
    times = _micros(moments["event_timestamp"])
    read = reader.historical_users(moments["user_id"].to_numpy(object), times)
    for scene in reader.manifest.scenes:
        ages = read.ages(scene)[read.sequences[scene].mask]
        assert (ages > 0).all()  # the basket of the request's own moment is not there
    after = reader.historical_users(moments["user_id"].to_numpy(object), times + 1)
    own = np.zeros(len(moments), dtype=bool)
    for scene in reader.manifest.scenes:
        sequence = after.sequences[scene]
        own |= ((sequence.timestamps == (times // 1_000_000)[:, None]) & sequence.mask).any(axis=1)
    assert own.all()  # a microsecond later it is


def test_values_by_hand(home: Home, reader: FeatureReader) -> None:
    events = pq.read_table(sorted(home.events.glob("*.parquet"))).to_pandas()
    at = pd.Timestamp("2024-03-10", tz="UTC")
    mine = events[
        (events["user_id"] == "7") & (events["event_timestamp"] < at) & (events["scene"] == "buy")
    ]
    read = reader.historical_users(["7"], np.array([int(at.timestamp() * 1e6)]))
    sequence = read.sequences["buy"]
    assert sequence.behavior_ids[0][sequence.mask[0]].tolist() == mine["behavior_id"].tolist()
    assert sequence.total.tolist() == [len(mine)]
    age = read.dense[0, read.dense_names.index("buy_last_age_days")]
    assert age == pytest.approx((at - mine["event_timestamp"].max()).total_seconds() / 86400)
    items = reader.historical_items(["P4"], np.array([int(at.timestamp() * 1e6)]))
    assert items.text_ids.tolist() == [behavior_id("glass bowl")]
    assert items.item_keys.tolist() == [item_key("P4")]
    assert items.categorical["shelf"].tolist() == ["metal"]
    assert items.dense[0, items.dense_names.index("price")] == pytest.approx(6.0)


FUTURE = st.lists(
    st.tuples(
        st.integers(0, 29),
        st.integers(0, 5),
        st.sampled_from(["buy", "look", "search"]),
        st.integers(0, 30 * 86_400),
    ),
    min_size=1,
    max_size=20,
)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(future=FUTURE)
def test_leak_events_at_or_after_the_request_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, reader: FeatureReader, home: Home, future: Any
) -> None:
    """Later events, and more events of the request's own basket, change no training feature."""
    cut = pd.Timestamp("2024-02-20 10:00:00", tz="UTC")
    folder = tmp_path_factory.mktemp("future")
    write_files(folder)
    with (folder / "log.csv").open("a") as log:
        for user, product, scene, offset in future:
            moment = (cut + timedelta(seconds=offset)).strftime("%Y-%m-%d %H:%M:%S")
            log.write(f"{user},{moment},{scene},from the future {product},P{product}\n")
    other_home = Home(folder / "home")
    ingest_only = load_toml_with_threshold(folder)
    ingest(other_home, ingest_only)
    manifest = load_manifest(other_home)
    for step in BUILDS:
        step(other_home, manifest, silent, threads=1)
    ENCODER.save(other_home.encoder)
    apply(other_home, "embedded")
    other = FeatureReader(other_home)
    rows = _impressions(home)
    rows = rows[rows["event_timestamp"] <= cut]
    users = np.append(rows["user_id"].to_numpy(object), [str(n) for n in range(30)])
    items = np.append(rows["item_id"].to_numpy(object), [f"P{n % 6}" for n in range(30)])
    times = np.append(_micros(rows["event_timestamp"]), np.full(30, int(cut.timestamp() * 1e6)))
    assert_equal(reader.historical_users(users, times), other.historical_users(users, times))
    assert_equal(reader.historical_items(items, times), other.historical_items(items, times))


def load_toml_with_threshold(folder: Path) -> Any:
    """The data set, with duplicate rows allowed: hypothesis likes them."""
    text = TOML.replace("replay = true", "replay = true\nreject_threshold = 0.2")
    (folder / "kitchen.toml").write_text(text, encoding="utf-8")
    return load_dataset(folder / "kitchen.toml", data_dir=folder)


def test_an_expired_row_is_missing_offline_and_online(home: Home, profile: str) -> None:
    """Feast applies a time to live offline only: the reader applies it online."""
    reader = FeatureReader(home, profile)
    short = timedelta(hours=20)
    reader._user_views = [
        type(view)(view.name, view.key, short, view.kinds) for view in reader._user_views
    ]
    users = np.array([str(n) for n in range(30)], dtype=object)
    online = reader.online_users(users)
    offline = reader.historical_users(users, reader.request_times(30))
    assert 0 < online.found.sum() < 30
    assert_equal(offline, online)


def test_ids_above_two_to_the_53_survive_beside_a_null(reader: FeatureReader) -> None:
    items = reader.online_items(["P0", "unknown", "P1"])
    assert items.text_ids.tolist() == [behavior_id("oak table"), 0, behavior_id("steel pan")]
    assert max(items.text_ids.tolist()) > 2**53
    offline = reader.historical_items(
        ["P0", "unknown", "P1"], reader.request_times(3), join="feast"
    )
    assert offline.text_ids.tolist() == items.text_ids.tolist()


def test_parity_finds_no_difference_and_then_one(tmp_path: Path) -> None:
    write_files(tmp_path)
    home = Home(tmp_path / "home")
    build(home, tmp_path)
    report = check_parity(home, "embedded", sample=50)
    assert report.mismatches == 0
    assert report.compared_values > 3_000
    # The history grows, the online store is not told.
    with (tmp_path / "log.csv").open("a") as log:
        log.write("5,2024-03-30 10:00:00,look,new thing,P1\n")
    ingest(home, load_dataset(tmp_path / "kitchen.toml", data_dir=tmp_path))
    for step in BUILDS:
        step(home, load_manifest(home), silent, threads=1)
    stale = check_parity(home, "embedded", sample=50)
    assert stale.mismatches > 0
    difference = stale.views["user_sequences"].differences[0]
    assert difference["key"] == "5"
    assert difference.keys() == {"feature", "key", "position", "offline", "online"}


def test_materialize_copies_what_is_new_and_forgets_what_is_gone(tmp_path: Path) -> None:
    write_files(tmp_path)
    home = Home(tmp_path / "home")
    build(home, tmp_path)
    assert all(view.start is None for view in materialize(home, "embedded"))
    lines = (tmp_path / "log.csv").read_text().splitlines()
    kept = [line for line in lines if not line.startswith("5,")]
    (tmp_path / "log.csv").write_text("\n".join(kept) + "\n")
    ingest(home, load_dataset(tmp_path / "kitchen.toml", data_dir=tmp_path))
    for step in BUILDS:
        step(home, load_manifest(home), silent, threads=1)
    materialize(home, "embedded")
    reader = FeatureReader(home)
    # Impressions of user 5 are still there, so the statistics know the user; the history is gone.
    assert not reader.online_users(["5"]).sequences["buy"].mask.any()
    assert check_parity(home, "embedded", sample=50).mismatches == 0


def test_steps_in_the_wrong_order_say_what_to_run(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    with pytest.raises(MissingStepError, match="run `longtrail ingest` first"):
        FeatureReader(home)
    write_files(tmp_path)
    (tmp_path / "kitchen.toml").write_text(TOML, encoding="utf-8")
    ingest(home, load_dataset(tmp_path / "kitchen.toml", data_dir=tmp_path))
    with pytest.raises(MissingStepError, match="run `longtrail apply` first"):
        FeatureReader(home)
    apply(home, "embedded")
    reader = FeatureReader(home)
    with pytest.raises(MissingStepError, match="run `longtrail sequences` first"):
        reader.historical_users(["1"], reader.request_times(1))
    with pytest.raises(MissingStepError, match="longtrail encode"):
        materialize(home, "embedded")


def test_a_store_that_is_held_or_lacks_a_table_is_one_sentence(home: Home) -> None:
    reader = FeatureReader(home)
    assert reader.online_users(["1"]).found[0]
    path = home.root / "online_store.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        own = reader.store._get_provider().online_store._get_conn(reader.store.config)
        own.execute("PRAGMA busy_timeout = 50")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError, match="database is locked"):
            reader.online_users(["1"])
        other.execute("ROLLBACK")
        assert reader.online_users(["1"]).found[0]
    with (
        closing(sqlite3.connect(":memory:")) as empty,
        pytest.raises(StoreError, match="lacks a view's table: run `longtrail apply`"),
        sqlite_errors(),
    ):
        empty.execute("SELECT * FROM longtrail_items")
