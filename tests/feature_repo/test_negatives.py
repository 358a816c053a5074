import numpy as np
import pandas as pd
import pytest

from feature_repo.dataset import Negatives
from feature_repo.errors import DataSetError
from feature_repo.negatives import SplitBounds, sample_extra, sample_impressions

DAY = 86_400_000_000
BOUNDS = SplitBounds(train=20 * DAY, valid=60 * DAY, test=80 * DAY)


def _positives(num: int = 4000) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    basket = rng.integers(0, num // 4, num)
    popularity = 1 / np.arange(1, 41)
    return pd.DataFrame(
        {
            "user_id": (basket % 50).astype(str),
            "item_id": rng.choice(40, num, p=popularity / popularity.sum()).astype(str),
            "event_timestamp": (basket * 100 * DAY // (num // 4)).astype(np.int64),
        }
    ).drop_duplicates()


def test_every_request_is_one_purchase_against_items_of_other_baskets() -> None:
    positives = _positives()
    options = Negatives(per_positive=4, window_days=14)
    rows = sample_impressions(positives, options, BOUNDS)
    bought = positives.groupby(["user_id", "event_timestamp"])["item_id"].agg(set)
    sales = positives.sort_values("event_timestamp")
    for _, request in rows.groupby("request_id"):
        assert len(request) == 5
        assert request["item_id"].is_unique
        assert request["clicked"].sum() == 1
        time = request["event_timestamp"].iloc[0]
        basket = bought[(request["user_id"].iloc[0], time)]
        positive = request.loc[request["clicked"] == 1, "item_id"].iloc[0]
        assert positive in basket
        assert not set(request["item_id"]) & (basket - {positive})
        window = sales[sales["event_timestamp"].between(time - 14 * DAY, time - 1)]
        assert set(request["item_id"]) <= set(window["item_id"])
    limits = {"train": (20, 60), "valid": (60, 80), "test": (80, 200)}
    for split, part in rows.groupby("split"):
        low, high = limits[str(split)]
        assert part["event_timestamp"].between(low * DAY, high * DAY - 1).all()


def test_negatives_follow_popularity() -> None:
    rows = sample_impressions(_positives(), Negatives(), BOUNDS)
    negatives = rows[rows["clicked"] == 0]["item_id"].value_counts(normalize=True)
    assert negatives["3"] > negatives["12"] > negatives["36"]


def test_the_same_seed_gives_the_same_rows_and_another_does_not() -> None:
    one = sample_impressions(_positives(), Negatives(seed=3), BOUNDS)
    pd.testing.assert_frame_equal(one, sample_impressions(_positives(), Negatives(seed=3), BOUNDS))
    assert not one.equals(sample_impressions(_positives(), Negatives(seed=4), BOUNDS))


def test_the_number_of_requests_can_be_limited_per_split() -> None:
    options = Negatives(max_requests={"train": 50, "test": 10})
    rows = sample_impressions(_positives(), options, BOUNDS)
    counts = rows.groupby("split")["request_id"].nunique()
    assert counts["train"] == 50
    assert counts["test"] == 10
    assert counts["valid"] > 100


def test_a_split_without_purchases_is_an_error() -> None:
    with pytest.raises(DataSetError, match="no request can be sampled for the test split"):
        sample_impressions(
            _positives(), Negatives(), SplitBounds(train=0, valid=60 * DAY, test=900 * DAY)
        )


def _keys(rows: pd.DataFrame) -> set[tuple[str, str, int]]:
    return set(pd.MultiIndex.from_frame(rows[["user_id", "item_id", "event_timestamp"]]))


def test_extra_requests_are_the_training_positives_that_nothing_covers() -> None:
    positives = _positives()
    some = sample_impressions(positives, Negatives(max_requests={"train": 200}), BOUNDS)
    everything = sample_impressions(positives, Negatives(), BOUNDS)
    covered = some.loc[some["clicked"] == 1, ["user_id", "item_id", "event_timestamp"]]
    extra = sample_extra(positives, Negatives(), BOUNDS, covered)
    assert set(extra["split"]) == {"extra"}
    assert not set(extra["request_id"]) & set(some["request_id"])
    clicked = extra["clicked"] == 1
    of_train = everything[(everything["split"] == "train") & (everything["clicked"] == 1)]
    assert _keys(extra[clicked]) == _keys(of_train) - _keys(covered)
    assert len(extra) > 1000
    # The same sampler: five items a request, the basket's other items never among them.
    assert (extra.groupby("request_id")["clicked"].agg(["sum", "size"]) == [1, 5]).all(axis=None)
    assert not _keys(extra[~clicked]) & _keys(positives)
    pd.testing.assert_frame_equal(extra, sample_extra(positives, Negatives(), BOUNDS, covered))


def test_where_all_is_covered_there_is_nothing_extra() -> None:
    positives = _positives()
    extra = sample_extra(positives, Negatives(), BOUNDS, positives)
    assert extra.empty
    assert {"request_id", "split", "clicked"} <= set(extra.columns)
