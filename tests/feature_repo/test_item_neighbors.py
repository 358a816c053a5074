"""Co-purchase: weights by the formula, nothing from after a refresh, one file where none is due."""

import math
from collections import defaultdict
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_repo import item_neighbors
from feature_repo.behavior import item_key
from feature_repo.dataset import load_dataset
from feature_repo.home import Home
from feature_repo.ingest import ingest
from feature_repo.item_neighbors import (
    NUM_NEIGHBORS,
    REFRESH_DAYS,
    SHRINKAGE,
    VIEW,
    BuildSummary,
    ItemEvents,
    build_item_neighbors,
    neighbor_rows,
)
from feature_repo.item_stats import build_item_stats
from feature_repo.manifest import load_manifest
from feature_repo.materialize import apply, materialize
from feature_repo.progress import silent
from feature_repo.reader import FeatureReader
from tests.feature_repo.event_tables import (
    DAY,
    HOUR,
    Event,
    Version,
    make_manifest,
    micros,
    view_rows,
    write_tables,
)

STEP = REFRESH_DAYS * DAY
FIRST = 1400 * STEP  # a refresh
SCENES = ("purchase", "view")
DELAY = 1


def write(root: Path, events: list[Event]) -> Home:
    manifest = make_manifest(events, SCENES, delay=DELAY, num_buckets=2)
    versions = [Version(item, DAY, 5) for item in sorted({e.item for e in events if e.item})]
    return write_tables(root, events, manifest, versions=versions)


def build(home: Home) -> BuildSummary:
    return build_item_neighbors(home, load_manifest(home), silent, threads=1)


def rows_of(home: Home) -> dict[tuple[str, int], dict[str, Any]]:
    return view_rows(home, VIEW, "item_id")


def oracle(events: list[Event], moment: int) -> dict[str, list[tuple[int, float, float]]]:
    """Item -> (key, weight over baskets, weight over users) of its neighbours, at one refresh."""
    baskets, users = defaultdict(set), defaultdict(set)
    for event in events:
        if event.item is not None and event.time < moment:
            baskets[event.user, event.time].add(event.item)
            users[event.user].add(event.item)

    def weights(groups: Any) -> dict[tuple[str, str], float]:
        sizes, both = defaultdict(int), defaultdict(int)
        for items in groups.values():
            for item in items:
                sizes[item] += 1
            for one, two in combinations(sorted(items), 2):
                both[one, two] += 1
                both[two, one] += 1
        return {
            pair: num / math.sqrt(sizes[pair[0]] * sizes[pair[1]] + SHRINKAGE)
            for pair, num in both.items()
        }

    by_basket, by_user = weights(baskets), weights(users)
    result: dict[str, list[tuple[int, float, float]]] = {
        item: [] for items in users.values() for item in items
    }
    for one, two in by_user:  # who shares a basket shares a user
        near = (item_key(two), by_basket.get((one, two), 0.0), by_user[one, two])
        result[one].append(near)
    return result


def assert_equals_oracle(home: Home, events: list[Event]) -> None:
    found = rows_of(home)
    last = max(event.time for event in events)
    first = min((event.time for event in events if event.item), default=last + STEP)
    moments = range((first // STEP + 1) * STEP, last + 1, STEP)
    expected = {
        (item, moment + DELAY): near
        for moment in moments
        for item, near in oracle(events, moment).items()
    }
    assert found.keys() == expected.keys()
    for key, row in found.items():
        near = zip(
            row["neighbor_keys"],
            row["neighbor_basket_weights"],
            row["neighbor_user_weights"],
            strict=True,
        )
        listed = list(near)
        sums = [basket + user for _, basket, user in listed]
        assert sums == sorted(sums, reverse=True)
        np.testing.assert_allclose(sorted(listed), sorted(expected[key]), rtol=1e-6)


def test_weights_by_hand(tmp_path: Path) -> None:
    at = FIRST - 5 * DAY
    events = [
        # ann's basket of a and b, in two scenes; b alone later; bob has a, then c.
        Event("ann", at, "purchase", 1, "a"),
        Event("ann", at, "view", 1, "b"),
        Event("ann", at, "view", 9, None),
        Event("ann", at + HOUR, "purchase", 1, "b"),
        Event("bob", at, "purchase", 1, "a"),
        Event("bob", at + HOUR, "purchase", 1, "c"),
        Event("cy", FIRST + DAY, "purchase", 1, "d"),
    ]
    home = write(tmp_path, events)
    summary = build(home)
    assert summary.num_rows == 3  # d is met after the refresh
    row = rows_of(home)["a", FIRST + DELAY]
    assert row["neighbor_keys"] == [item_key("b"), item_key("c")]
    basket = 1 / math.sqrt(2 * 2 + SHRINKAGE)  # a and b lie in two baskets each, in one together
    user = 1 / math.sqrt(2 * 1 + SHRINKAGE)  # a has two users, b and c one each
    np.testing.assert_allclose(row["neighbor_basket_weights"], [basket, 0], rtol=1e-6)
    np.testing.assert_allclose(row["neighbor_user_weights"], [user, user], rtol=1e-6)
    assert_equals_oracle(home, events)


event = st.builds(
    Event,
    user=st.sampled_from(["ann", "bob", "cy"]),
    time=st.integers(-2, 40).map(lambda n: FIRST + n * DAY) | st.just(FIRST - 1_000_000),
    scene=st.sampled_from(SCENES),
    behavior=st.sampled_from([1, 2]),
    item=st.sampled_from([None, "a", "b", "c", "d"]),
)


@settings(derandomize=True, max_examples=12, deadline=None)
@given(events=st.lists(event, min_size=1, max_size=20, unique=True))
def test_rows_are_those_of_the_oracle(
    tmp_path_factory: pytest.TempPathFactory, events: list[Event]
) -> None:
    home = write(tmp_path_factory.mktemp("near"), events)
    build(home)
    assert_equals_oracle(home, events)


def random_events(num: int = 200) -> list[Event]:
    generator = np.random.default_rng(0)
    draws = zip(
        generator.integers(0, 8, num),
        generator.integers(-20 * 24, 20 * 24, num),
        generator.integers(0, 12, num),
        strict=True,
    )
    rows = {Event(f"u{u}", FIRST + int(t) // 6 * 6 * HOUR, "view", 1, f"i{i}") for u, t, i in draws}
    return sorted(rows)


def test_leak_events_at_or_after_a_refresh_change_no_row_of_it(tmp_path: Path) -> None:
    events = random_events()
    build(home := write(tmp_path / "before", events))
    later = [
        Event(user, time, "purchase", 2, item)
        for user in ("u0", "u1", "new")
        for time in (FIRST, FIRST + 1, FIRST + DAY)
        for item in ("i0", "i1", "new")
    ]
    build(other := write(tmp_path / "after", events + later))
    before, after = rows_of(home), rows_of(other)
    until = FIRST + DELAY
    kept = {key: row for key, row in before.items() if key[1] <= until}
    assert len({time for _, time in kept}) >= 2
    assert kept == {key: row for key, row in after.items() if key[1] <= until}
    assert before != {key: row for key, row in after.items() if key in before}  # the next does


def test_the_files_are_the_same_every_time_and_a_second_run_does_nothing(tmp_path: Path) -> None:
    events = random_events()
    first, second = write(tmp_path / "a", events), write(tmp_path / "b", events[::-1])
    summary = build(first)
    build(second)
    files = [sorted(home.view(VIEW).glob("*.parquet")) for home in (first, second)]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    assert len(files[0]) == 3
    for one, two in zip(*files, strict=True):
        assert one.read_bytes() == two.read_bytes()
    again = build(first)
    assert (again.num_rows, again.num_new_rows, again.num_buckets_built) == (summary.num_rows, 0, 0)
    files[0][0].unlink()
    assert build(first).num_new_rows == summary.num_rows


def numbers(*events: tuple[int, int, int], num_items: int) -> ItemEvents:
    users, items, seconds = np.array(sorted(events, key=lambda e: e[2])).T
    ids = np.array([f"i{n}" for n in range(num_items)], dtype=object)
    return ItemEvents(users.astype(np.int32), items.astype(np.int32), seconds, ids)


def neighbors_of(events: ItemEvents) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for rows in neighbor_rows(events):
        ends = np.cumsum(rows.counts)
        for item, count, end in zip(rows.items, rows.counts, ends, strict=True):
            found[int(item)] = set(rows.neighbors[end - count : end].tolist())
    return found


def test_of_a_large_group_the_newest_items_count(monkeypatch: pytest.MonkeyPatch) -> None:
    # User 0 has items 0 to 5 at times 0 to 5, and item 0 once more at the end.
    events = numbers(*((0, n, n) for n in range(6)), (0, 0, 9), (1, 1, 3), num_items=6)
    monkeypatch.setattr(item_neighbors, "MAX_ITEMS_PER_GROUP", 3)
    assert neighbors_of(events) == {
        0: {4, 5}, 1: set(), 2: set(), 3: set(), 4: {0, 5}, 5: {0, 4}
    }  # fmt: skip
    monkeypatch.setattr(item_neighbors, "MAX_ITEMS_PER_GROUP", 1000)
    assert neighbors_of(events)[1] == {0, 2, 3, 4, 5}


def test_blocks_change_nothing_and_the_nearest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    num = NUM_NEIGHBORS + 30
    # Item 0 is met with every other one, with the first ones by more users.
    triples = [(user, item, user) for item in range(1, num) for user in range(1 + (item <= 40))]
    triples += [(user, 0, user) for user in range(2)]
    events = numbers(*triples, num_items=num)
    whole = neighbors_of(events)
    assert len(whole[0]) == NUM_NEIGHBORS
    assert set(range(1, 41)) <= whole[0]
    monkeypatch.setattr(item_neighbors, "_BLOCK_VALUES", 7 * num)
    assert neighbors_of(events) == whole


LOG = "customer,moment,kind,words,product\n"
QUIET = """name = "quiet"
[events]
sql = '''SELECT customer AS user_id, moment AS event_timestamp, kind AS scene, words AS text,
    product AS item_id FROM '{dir}/log.csv' '''
[items]
sql = '''SELECT product AS item_id, product AS text FROM '{dir}/log.csv' GROUP BY ALL'''
[split]
valid = 2024-02-01
test = 2024-03-01
"""


def ready(folder: Path, log: str) -> Home:
    """Items and neighbours of a log, registered and online."""
    (folder / "log.csv").write_text(LOG + log, encoding="utf-8")
    (folder / "quiet.toml").write_text(QUIET, encoding="utf-8")
    home = Home(folder / "home")
    ingest(home, load_dataset(folder / "quiet.toml", data_dir=folder))
    for step in (build_item_stats, build_item_neighbors):
        step(home, load_manifest(home), silent, threads=1)
    apply(home, "embedded")
    materialize(home, "embedded")
    return home


def test_the_reader_gives_equal_arrays_offline_and_online(tmp_path: Path) -> None:
    days = (1, 5, 9, 20, 25, 31)
    lines = [
        f"{user},2024-01-{day:02d} 10:00:00,buy,thing {product},P{product}\n"
        for user in range(4)
        for day in days
        for product in {user, day % 5, (user + day) % 3}
    ]
    reader = FeatureReader(ready(tmp_path, "".join(lines)))
    items = np.array(["P0", "P1", "nothing", "P2"], dtype=object)
    times = reader.request_times(len(items))
    online = reader.online_items(items)
    assert online.neighbor_keys.shape == (4, NUM_NEIGHBORS)
    assert online.neighbor_weights.shape == (4, NUM_NEIGHBORS, 2)
    assert (online.neighbor_keys[[0, 1, 3]] != 0).any(axis=1).all()
    assert not online.neighbor_keys[2].any()
    assert ((online.neighbor_weights > 0).any(axis=2) == (online.neighbor_keys != 0)).all()
    for join in ("fast", "feast"):
        offline = reader.historical_items(items, times, join=join)  # type: ignore[arg-type]
        np.testing.assert_array_equal(offline.neighbor_keys, online.neighbor_keys)
        np.testing.assert_array_equal(offline.neighbor_weights, online.neighbor_weights)
    met = np.full(len(items), micros(datetime(2024, 1, 2, tzinfo=UTC)))
    for join in ("fast", "feast"):  # no row of the view is found at all
        early = reader.historical_items(items, met, join=join)  # type: ignore[arg-type]
        assert early.neighbor_keys.shape == (4, NUM_NEIGHBORS)
        assert early.neighbor_keys.dtype == np.int64
        assert not early.neighbor_keys.any()


def test_without_a_refresh_there_is_one_empty_file_that_all_survive(tmp_path: Path) -> None:
    lines = [f"{n},2024-01-02 10:0{n}:00,buy,thing,P{n % 2}\n" for n in range(6)]
    home = ready(tmp_path, "".join(lines))
    (file,) = home.view(VIEW).glob("*.parquet")
    empty: pa.Table = pq.read_table(file)
    assert empty.num_rows == 0
    assert empty.column_names[:3] == ["item_id", "event_timestamp", "created_timestamp"]
    assert build(home).num_new_rows == 0
    reader = FeatureReader(home)
    times = reader.request_times(2)
    for features in (
        reader.online_items(["P0", "P1"]),
        reader.historical_items(["P0", "P1"], times),
        reader.historical_items(["P0", "P1"], times, join="feast"),
    ):
        assert features.found.all()
        assert not features.neighbor_keys.any()
        assert not features.neighbor_weights.any()
        assert features.neighbor_keys.shape == (2, NUM_NEIGHBORS)


def test_events_without_items_have_no_neighbours(tmp_path: Path) -> None:
    events = [Event("ann", FIRST - DAY, "view", 1), Event("ann", FIRST + STEP, "view", 1)]
    home = write(tmp_path, events)
    assert build(home).num_rows == 0
