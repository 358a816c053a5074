"""Every value against a slow reference by hand, and training against serving."""

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.evidence import (
    NEWEST_DAYS,
    RECENT_DAYS,
    TEXT_LENGTH,
    candidate_evidence,
    evidence_names,
)
from encoders.inputs import ItemInputs, UserInputs
from encoders.loaded_artifact import Artifact
from encoders.table import EmbeddingTable
from serving.scoring import Scorer
from tests.serving.conftest import toy_manifest
from tests.training.world import LENGTH, SCENES, START, WIDTH, make_world
from training.dataset import read_clicks
from training.impressions import load_impressions

DAY = 86_400
NUM_ROWS, NUM_KEYS, KEPT = 7, 9, 12
BIG = 2**62  # keys are hashes: far above 2**53, some alike in their last bits
KEYS = [0, *(BIG + (index << (3 * index)) for index in range(1, NUM_KEYS))]
NAMES = evidence_names(("a", "b"))


def make_table() -> EmbeddingTable:
    vectors = np.random.default_rng(3).normal(size=(NUM_ROWS, 5)).astype(np.float32)
    vectors[0] = 0
    vectors[4] = 0  # a text whose vector is zero has no direction
    return EmbeddingTable(np.arange(1, NUM_ROWS), vectors, "table")


TABLE = make_table()


def make_user(scenes, kept: int = KEPT) -> UserInputs:
    """One user; of each scene (key, row, age in seconds), oldest first."""
    arrays = np.zeros((3, 1, len(scenes), kept), dtype=np.int64)
    for scene, events in enumerate(scenes):
        for place, event in enumerate(events, start=kept - len(events)):
            arrays[:, 0, scene, place] = event
    keys, rows, ages = arrays
    totals = np.array([[len(events) for events in scenes]], dtype=np.float32)
    return UserInputs(rows, keys, ages.astype(np.float32), totals, np.zeros((1, 0), np.float32))


def make_items(candidates, neighbors=None) -> ItemInputs:
    """Candidates (key, row), each with neighbours {key: (weight, weight)}."""
    neighbors = neighbors or [{} for _ in candidates]
    num = max((len(near) for near in neighbors), default=0)
    keys = np.zeros((len(candidates), num), dtype=np.int64)
    weights = np.zeros((len(candidates), num, 2), dtype=np.float32)
    for row, near in enumerate(neighbors):
        keys[row, num - len(near) :] = list(near)  # as the reader aligns them
        weights[row, num - len(near) :] = np.reshape(list(near.values()), (-1, 2))
    return ItemInputs(
        candidate_rows=np.array([row for _, row in candidates], dtype=np.int64),
        candidate_item_keys=np.array([key for key, _ in candidates], dtype=np.int64),
        candidate_dense=np.zeros((len(candidates), 0), np.float32),
        candidate_categories=np.zeros((len(candidates), 0), np.int64),
        neighbor_keys=keys,
        neighbor_weights=weights,
    )


def reference(scenes, candidate, near, kept: int = KEPT) -> list[float]:
    """The values of one candidate, as the docstrings say them."""
    key, row = candidate
    values: list[float] = []
    for events in scenes:
        named = [event for event in events if event[0]]
        ages = [age for other, _, age in named if other == key]
        if not ages or not key:
            values += [math.nan] * 6
            continue
        since_oldest = {age for _, _, age in named if age <= ages[0]}
        after_newest = {age for _, _, age in named if age < ages[-1]}
        days = [age / DAY for age in ages]
        previous = days[-2] if len(days) > 1 else math.nan
        share = len(ages) / len(since_oldest)
        values += [len(ages), days[-1], previous, days[0], share, len(after_newest)]
    newest: dict[int, float] = {}
    for other, _, age in (event for events in scenes for event in events if event[0]):
        newest[other] = min(newest.get(other, math.inf), age / DAY)
    for which in range(2):
        met = [
            (weights[which], newest[other]) for other, weights in near.items() if other in newest
        ]
        recent = [weight * math.exp(-days / RECENT_DAYS) for weight, days in met]
        values += [
            sum(weight for weight, _ in met),
            max([weight for weight, _ in met], default=0),
            sum(recent),
            max(recent, default=0),
            sum(weight * math.exp(-days / NEWEST_DAYS) for weight, days in met),
        ]
    for events in scenes:
        cosines = []
        for other, text, age in events[-min(TEXT_LENGTH, kept) :]:
            if text and row and not (key and other == key):
                one, two = TABLE.vectors[row].astype(float), TABLE.vectors[text].astype(float)
                lengths = float(np.linalg.norm(one) * np.linalg.norm(two))
                cosine = float(one @ two) / lengths if lengths else 0.0
                cosines.append((cosine, cosine * math.exp(-age / DAY / RECENT_DAYS)))
        if not cosines:
            values += [math.nan] * 3
            continue
        plain = [cosine for cosine, _ in cosines]
        values += [max(plain), sum(plain) / len(plain), max(recent for _, recent in cosines)]
    return values


def check(scenes, candidates, neighbors=None, kept: int = KEPT) -> np.ndarray:
    user, items = make_user(scenes, kept), make_items(candidates, neighbors)
    found = candidate_evidence(user, 0, items, TABLE)
    assert found.dtype == np.float32
    assert found.shape == (len(candidates), len(evidence_names(range(len(scenes)))))
    neighbors = neighbors or [{} for _ in candidates]
    expected = [
        reference(scenes, c, near, kept) for c, near in zip(candidates, neighbors, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)
    return found


@st.composite
def histories(draw):
    """Events oldest first, some at one moment, some without item, some without vector."""
    scenes = []
    for _ in range(2):
        gaps = draw(st.lists(st.sampled_from([0, 0, 50, DAY, 40 * DAY]), max_size=KEPT))
        ages = np.cumsum(gaps[::-1])[::-1].tolist()
        kinds = st.tuples(st.sampled_from(KEYS), st.integers(0, NUM_ROWS - 1)).filter(any)
        scenes.append([(*draw(kinds), age) for age in ages])
    return scenes


CANDIDATES = st.tuples(st.sampled_from(KEYS), st.integers(0, NUM_ROWS - 1))
WEIGHTS = st.tuples(st.floats(0, 1, width=32), st.floats(0, 1, width=32))
NEIGHBORS = st.dictionaries(st.sampled_from(KEYS[1:]), WEIGHTS, max_size=5)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(scenes=histories(), pairs=st.lists(st.tuples(CANDIDATES, NEIGHBORS), min_size=1, max_size=4))
def test_every_value_is_that_of_the_reference(scenes, pairs):
    check(scenes, [candidate for candidate, _ in pairs], [near for _, near in pairs])


def test_values_by_hand():
    one, two, three = KEYS[1:4]
    events = [(one, 1, 30 * DAY), (two, 2, 30 * DAY), (one, 1, 20 * DAY), (three, 3, 5 * DAY)]
    near = {two: (0.5, 0.25), three: (0.25, 0.5)}
    row = dict(zip(NAMES, check([events, []], [(one, 1)], [near])[0].tolist(), strict=True))
    assert [row[f"same_a_{what}"] for what in ("count", "last_days", "previous_days")] == [
        2,
        20,
        30,
    ]
    assert row["same_a_first_days"] == 30
    assert row["same_a_basket_share"] == pytest.approx(2 / 3)
    assert row["same_a_baskets_since"] == 1
    assert row["near_basket_sum"] == 0.75
    assert row["near_user_max"] == 0.5
    assert row["near_basket_newest_sum"] == pytest.approx(
        0.5 * math.exp(-2) + 0.25 * math.exp(-1 / 3)
    )
    assert math.isnan(row["same_b_count"])
    assert math.isnan(row["text_b_max"])


def test_an_empty_history_has_nothing_to_say():
    found = check([[], []], [(KEYS[1], 1), (0, 0)], [{KEYS[2]: (0.5, 0.5)}, {}])
    near = [name.startswith("near_") for name in NAMES]
    assert (found[:, near] == 0).all()
    assert np.isnan(found[:, ~np.array(near)]).all()


def test_items_without_neighbours_and_no_items_at_all():
    events = [(KEYS[1], 1, DAY)]
    assert check([events, []], [(KEYS[1], 1)]).shape == (1, len(NAMES))
    none = make_items([(KEYS[1], 1)]).take(slice(0, 0))
    assert candidate_evidence(make_user([events, []]), 0, none, TABLE).shape == (0, len(NAMES))


def test_a_candidate_of_padding_is_not_what_behaviours_without_item_are_about():
    found = check([[(0, 2, DAY), (0, 0, DAY)], [(KEYS[1], 3, DAY)]], [(0, 1), (0, 0)])
    assert np.isnan(found[:, [name.startswith("same_") for name in NAMES]]).all()
    assert np.isfinite(found[0, NAMES.index("text_a_max")])


def test_padding_and_how_much_is_kept_change_nothing():
    events = [[(KEYS[1], 1, 9 * DAY), (KEYS[2], 2, DAY)], [(KEYS[1], 3, 2 * DAY)]]
    items = make_items([(KEYS[1], 2), (KEYS[2], 3)], [{KEYS[2]: (0.5, 0.25)}, {}])
    short = candidate_evidence(make_user(events, 3), 0, items, TABLE)
    np.testing.assert_allclose(
        candidate_evidence(make_user(events, 40), 0, items, TABLE), short, rtol=1e-6
    )


def test_texts_beyond_the_newest_are_not_compared_and_items_still_count():
    old = [(KEYS[1], 1, 90 * DAY)] * 5
    new = [(KEYS[2], 2, DAY)] * TEXT_LENGTH
    found = check([old + new, []], [(KEYS[1], 1), (KEYS[3], 1)], kept=TEXT_LENGTH + 20)
    assert found[0, NAMES.index("same_a_count")] == 5
    without_old = check([new, []], [(KEYS[3], 1)], kept=TEXT_LENGTH + 20)
    text = [name.startswith("text_") for name in NAMES]
    np.testing.assert_array_equal(found[1, text], without_old[0, text])


def test_candidates_and_users_do_not_see_each_other():
    generator = np.random.default_rng(0)
    users = [
        [
            [
                (KEYS[generator.integers(NUM_KEYS)], generator.integers(1, NUM_ROWS), age * DAY)
                for age in range(num, 0, -1)
            ]
            for num in generator.integers(0, KEPT, 2)
        ]
        for _ in range(3)
    ]
    candidates = [(KEYS[key], key % NUM_ROWS) for key in range(NUM_KEYS)]
    neighbors = [{KEYS[1 + key % 8]: (0.5, 0.125)} for key in range(NUM_KEYS)]
    items = make_items(candidates, neighbors)
    parts = [make_user(scenes) for scenes in users]
    names = ("history_rows", "history_item_keys", "history_ages")
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    together = replace(parts[0], **joined)
    for row, part in enumerate(parts):
        whole = candidate_evidence(together, row, items, TABLE)
        np.testing.assert_array_equal(whole, candidate_evidence(part, 0, items, TABLE))
        for candidate in range(NUM_KEYS):
            one = items.take(np.array([candidate]))
            alone = candidate_evidence(part, 0, one, TABLE)[0]
            np.testing.assert_allclose(alone, whole[candidate], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kinds", [(), ("same",), ("near", "text")])
def test_kinds_that_are_not_wanted_are_left_out_and_change_no_other(kinds):
    events = [[(KEYS[1], 1, 9 * DAY), (KEYS[2], 2, DAY)], [(KEYS[1], 3, 2 * DAY)]]
    items = make_items([(KEYS[1], 2), (KEYS[2], 3)], [{KEYS[2]: (0.5, 0.25)}, {}])
    whole = candidate_evidence(make_user(events), 0, items, TABLE)
    found = candidate_evidence(make_user(events), 0, items, TABLE, kinds)
    wanted = np.array([name.split("_")[0] in kinds for name in NAMES])
    np.testing.assert_array_equal(found[:, wanted], whole[:, wanted])
    assert np.isnan(found[:, ~wanted]).all()


def test_serving_gives_the_program_the_evidence_of_training(tmp_path):
    world = make_world(tmp_path / "home", num_users=30)
    sources = world.sources
    impressions = load_impressions(sources.home, sources.manifest, "train")
    viewed = world.events.groupby("user_id")["item_id"].first()
    impressions.item_ids[::4] = [viewed.get(u, "item000") for u in impressions.user_ids[::4]]
    data = read_clicks(
        impressions, sources.reader, sources.table, scenes=SCENES, sequence_length=LENGTH
    )
    manifest = toy_manifest(
        scenes=SCENES,
        sequence_length=LENGTH,
        evidence_names=data.evidence_names,
        user_dense_names=data.user_dense_names,
        item_dense_names=data.item_dense_names,
        context_names=("hour",),
        category_vocabularies=data.category_vocabularies,
        encoder_fingerprint=sources.table.fingerprint,
        encoder_width=WIDTH,
    )
    calls = []

    def score(*inputs):
        calls.append([tensor.numpy() for tensor in inputs])
        return inputs[6].float()

    scorer = Scorer(Artifact(manifest, score), sources.table, chunk_size=10)
    assert data.num_contexts > 20
    for context in range(data.num_contexts):
        rows = slice(data.offsets[context], data.offsets[context + 1])
        shown = data.impressions.take(np.arange(rows.start, rows.stop))
        at = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=int(shown.times[0]))
        assert at > START
        user = scorer.user_side(sources.reader.online_users(shown.user_ids[:1], at=at))
        items = scorer.item_side(sources.reader.online_items(shown.item_ids, at=at))
        scorer.logits(user, items, {"hour": 12.0})
        np.testing.assert_array_equal(calls[-1][-1][0], data.evidence[rows])
        np.testing.assert_array_equal(calls[-1][1][0], data.users.history_rows[context])
    met = np.isfinite(data.evidence).any(axis=0)
    assert {name.split("_")[0] for name in np.array(data.evidence_names)[met]} == {
        "same", "near", "text"
    }  # fmt: skip
    near = [name.startswith("near_") for name in data.evidence_names]
    assert (data.evidence[:, near] > 0).any()
