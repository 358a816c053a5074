"""Which items of a large catalogue are scored, and which are alike."""

from datetime import UTC, datetime

import numpy as np
import pytest

from encoders.inputs import ItemInputs
from serving.answers import UnknownItemError
from serving.history import History
from serving.items import Catalogue, ItemSnapshot
from serving.retrieval import MAX_MET, MAX_POPULAR, retrieve, similar
from tests.serving.conftest import ToyItem, World

NUM_ITEMS, WIDTH = 3000, 4
MOST_ITEMS = 1_000_000
"""What the service promises to retrieve from exactly."""


def catalogue(outputs: np.ndarray | None, popularity: np.ndarray) -> Catalogue:
    num = len(popularity)
    items = ItemSnapshot(
        at=datetime(2024, 1, 1, tzinfo=UTC),
        item_ids=np.char.mod("i%05d", np.arange(num)).astype(object),
        text_ids=np.arange(1, num + 1),
        inputs=ItemInputs(
            candidate_rows=np.arange(1, num + 1),
            candidate_item_keys=np.arange(num) * 7 + 1,
            candidate_dense=np.zeros((num, 0), np.float32),
            candidate_categories=np.zeros((num, 0), np.int64),
            neighbor_keys=np.zeros((num, 0), np.int64),
            neighbor_weights=np.zeros((num, 0, 2), np.float32),
        ),
        age_columns=np.zeros(0, np.int64),
        moments=np.zeros((num, 0)),
        recent_behaviors=popularity.astype(np.float32),
        outputs=outputs,
    )
    directions = np.zeros((num, 2), np.float32)
    return Catalogue(None, items, directions, popular_from=1.0, alike_from=0.9)  # type: ignore[arg-type]


def history(*item_rows: int) -> History:
    """Newest first."""
    num = len(item_rows)
    return History(
        scenes=np.full(num, "view", dtype=object),
        behavior_ids=np.ones(num, np.int64),
        item_keys=np.array(item_rows, np.int64) * 7 + 1,
        timestamps=np.arange(num, 0, -1),
        positions=np.arange(num),
        now=10**6,
    )


@pytest.fixture
def outputs() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(NUM_ITEMS, WIDTH)).astype(np.float32)


def test_a_small_catalogue_is_scored_whole(outputs: np.ndarray) -> None:
    found = retrieve(catalogue(outputs, np.zeros(NUM_ITEMS)), history(), None, NUM_ITEMS)
    assert found.tolist() == list(range(NUM_ITEMS))


def test_met_popular_and_nearest_items(outputs: np.ndarray) -> None:
    popularity = np.zeros(NUM_ITEMS)
    popularity[1000 : 1000 + MAX_POPULAR] = np.arange(1, MAX_POPULAR + 1)
    user = np.random.default_rng(1).normal(size=(1, 2, WIDTH)).astype(np.float32)
    met = (2999, 5, 2999, 77)
    found = retrieve(catalogue(outputs, popularity), history(*met), user, 500)
    assert len(found) == 500
    assert (np.diff(found) > 0).all()
    chosen = {*met, *range(1000, 1000 + MAX_POPULAR)}
    assert chosen <= set(found.tolist())
    products = outputs @ user[0].sum(0)
    exact = [row for row in np.argsort(-products) if row not in chosen][: 500 - len(chosen)]
    assert set(found.tolist()) == chosen | set(exact)


def test_the_best_of_a_million_are_found_exactly() -> None:
    rng = np.random.default_rng(3)
    # Whole numbers: products are exact, whichever way and order they are summed up.
    outputs = rng.integers(-1000, 1000, size=(MOST_ITEMS, WIDTH)).astype(np.float32)
    user = rng.integers(-50, 50, size=(1, 2, WIDTH)).astype(np.float32)
    popularity = rng.permutation(MOST_ITEMS)
    met = (MOST_ITEMS - 1, 0, 123_456)
    number = 500
    found = retrieve(catalogue(outputs, popularity), history(*met), user, number)
    assert len(np.unique(found)) == number
    first = {*met, *np.flatnonzero(popularity >= MOST_ITEMS - MAX_POPULAR).tolist()}
    assert first <= set(found.tolist())
    products = outputs.astype(np.int64) @ user[0].sum(axis=0).astype(np.int64)
    # By brute force: nothing that was left out is better than the worst of the rest.
    others = np.ones(MOST_ITEMS, dtype=bool)
    others[list(first)] = False
    expected = np.sort(products[others])[::-1][: number - len(first)]
    rest = [row for row in found.tolist() if row not in first]
    assert sorted(products[rest].tolist(), reverse=True) == expected.tolist()


def test_the_newest_distinct_items_of_a_long_history(outputs: np.ndarray) -> None:
    rows = [row for row in range(600) for _ in range(3)]
    user = np.zeros((1, 1, WIDTH), np.float32)
    found = retrieve(catalogue(outputs, np.zeros(NUM_ITEMS)), history(*rows), user, 400)
    assert set(range(MAX_MET)) <= set(found.tolist())


def test_popularity_decides_where_there_are_no_outputs() -> None:
    popularity = np.random.default_rng(2).permutation(NUM_ITEMS)
    found = retrieve(catalogue(None, popularity), history(), None, 300)
    assert set(found.tolist()) == set(np.argsort(-popularity)[:300].tolist())


def test_keys_that_are_no_items_are_left_out(outputs: np.ndarray) -> None:
    whole = catalogue(outputs, np.zeros(NUM_ITEMS))
    assert whole.rows_of_keys(np.array([1, 2, 8, 10**9])).tolist() == [0, 1]
    assert whole.ids_of_keys(np.array([8, 3])) == ["i00001", None]


def test_similar_items_nearest_first(outputs: np.ndarray) -> None:
    whole = catalogue(outputs, np.zeros(NUM_ITEMS))
    units = outputs / np.linalg.norm(outputs, axis=1, keepdims=True)
    units[9] = 0  # no text
    whole = Catalogue(None, whole.items, units, 1.0, 0.9)  # type: ignore[arg-type]
    rows, cosines = similar(whole, 4, 10)
    expected = units @ units[4]
    expected[[4, 9]] = -2
    assert rows.tolist() == np.argsort(-expected, kind="stable")[:10].tolist()
    np.testing.assert_allclose(cosines, expected[rows], atol=1e-6)


def test_a_ranker_finds_alike_items_by_their_texts(world: World) -> None:
    ranker = world.ranker()
    found = ranker.similar("L1", top_k=2)
    assert (found[0].item_id, found[0].text) == ("L2", "green lamp")
    assert found[0].similarity == pytest.approx(0.96, abs=1e-6)
    with pytest.raises(UnknownItemError, match="does not know the item 'zzz'"):
        ranker.similar("zzz")


def test_a_ranker_scores_as_many_as_configured(world: World) -> None:
    world.reader.items |= {f"N{i:02}": ToyItem("anvil", recent=i) for i in range(20)}
    found = world.ranker(num_retrieved=10).rank("bob", top_k=20)
    assert found.num_scored == 10
    ids = {item.item_id for item in found.ranked}
    assert ids == {"B1", *(f"N{i}" for i in range(11, 20))}  # met, and the most popular
