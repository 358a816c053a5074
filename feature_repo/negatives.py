"""Labels where no impressions were logged: each purchase against items drawn by recent popularity.

A sampler that leaks an item's trend flatters every model, so the negatives of a request come from
the positives of the days just before it, and a positive that could not have been drawn as a
negative is left out.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from feature_repo.dataset import Negatives
from feature_repo.errors import DataSetError

_DAY_US = 86_400_000_000
_SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class SplitBounds:
    """First microseconds (epoch) of the three splits; train's is the first request allowed."""

    train: int
    valid: int
    test: int

    def names(self, times: NDArray[np.int64]) -> NDArray[np.object_]:
        """Split of each time; None before ``train``."""
        edges = np.array([self.train, self.valid, self.test])
        labels = np.array([None, *_SPLITS], dtype=object)
        return labels[np.searchsorted(edges, times, side="right")]


def sample_impressions(
    positives: pd.DataFrame, options: Negatives, bounds: SplitBounds
) -> pd.DataFrame:
    """One request per positive: the bought item and ``per_positive`` items that were not.

    A negative is the item of a positive drawn uniformly from the window before the request. Items
    of the same basket (same user and time) and repeats inside the request are drawn again.
    Deterministic by ``options.seed``. Cost O(n log n) for n positives.

    Args:
        positives: user_id, item_id, event_timestamp (int64 epoch microseconds), unique rows.
        options: Numbers and seed.
        bounds: The time split.

    Returns:
        request_id, user_id, item_id, event_timestamp (int64), clicked (int8), split; the rows of a
        request in random order, requests in order of time.

    Raises:
        DataSetError: If a split has no request that can be built.
    """
    positives = positives.sort_values(["event_timestamp", "user_id", "item_id"], kind="stable")
    times = positives["event_timestamp"].to_numpy(np.int64)
    item_ids, items = np.unique(positives["item_id"].to_numpy(str), return_inverse=True)
    users = pd.factorize(positives["user_id"])[0].astype(np.int64)
    baskets = pd.factorize(pd.MultiIndex.from_arrays([users, times]))[0].astype(np.int64)
    window_us = options.window_days * _DAY_US
    rng = np.random.default_rng(options.seed)

    chosen = _choose(times, items, window_us, options, bounds, rng)
    negatives = _draw(times, items, baskets, chosen, window_us, options.per_positive, rng)
    complete = (negatives >= 0).all(axis=1)
    chosen, negatives = chosen[complete], negatives[complete]

    candidates = np.concatenate([items[chosen][:, None], negatives], axis=1)
    order = rng.random(candidates.shape).argsort(axis=1)
    width = candidates.shape[1]
    return pd.DataFrame(
        {
            "request_id": np.repeat(np.arange(len(chosen)).astype(str), width),
            "user_id": np.repeat(positives["user_id"].to_numpy(object)[chosen], width),
            "item_id": item_ids[np.take_along_axis(candidates, order, axis=1).ravel()],
            "event_timestamp": np.repeat(times[chosen], width),
            "clicked": (order == 0).astype(np.int8).ravel(),
            "split": np.repeat(bounds.names(times[chosen]), width),
        }
    )


def _choose(
    times: NDArray[np.int64],
    items: NDArray[np.int64],
    window_us: int,
    options: Negatives,
    bounds: SplitBounds,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Rows that become requests: drawable themselves, at most ``max_requests`` per split."""
    by_item = np.lexsort((times, items))
    sorted_items, sorted_times = items[by_item], times[by_item]
    # The nearest earlier sale of the same item, strictly before.
    first = np.searchsorted(sorted_items, sorted_items, side="left")
    earlier = _first_of_equal(sorted_items, sorted_times) - 1
    has_earlier = earlier >= first
    gap = sorted_times - sorted_times[np.maximum(earlier, 0)]
    drawable = np.empty(len(times), dtype=bool)
    drawable[by_item] = has_earlier & (gap <= window_us)

    names = bounds.names(times)
    rows: list[NDArray[np.int64]] = []
    for split in _SPLITS:
        of_split = np.flatnonzero(drawable & (names == split))
        if not len(of_split):
            raise DataSetError(
                f"no request can be sampled for the {split} split: expected purchases whose item "
                f"was also sold in the {options.window_days} days before; check [split]"
            )
        limit = options.max_requests.get(split, len(of_split))  # type: ignore[call-overload]
        if limit < len(of_split):
            of_split = np.sort(rng.choice(of_split, size=limit, replace=False))
        rows.append(of_split)
    return np.concatenate(rows)


def _first_of_equal(items: NDArray[np.int64], times: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index of the first row with the same item and time, rows sorted by both."""
    changes = np.r_[True, (items[1:] != items[:-1]) | (times[1:] != times[:-1])]
    starts = np.flatnonzero(changes)
    first: NDArray[np.int64] = starts[np.cumsum(changes) - 1]
    return first


def _draw(
    times: NDArray[np.int64],
    items: NDArray[np.int64],
    baskets: NDArray[np.int64],
    chosen: NDArray[np.int64],
    window_us: int,
    per_positive: int,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Item indexes [requests, per_positive]; -1 where the window holds too few other items."""
    num_items = int(items.max()) + 1
    in_basket = np.unique(baskets * num_items + items)
    low = np.searchsorted(times, times[chosen] - window_us, side="left")
    high = np.searchsorted(times, times[chosen], side="left")
    drawn = np.full((len(chosen), per_positive), -1, dtype=np.int64)
    filled = np.zeros(len(chosen), dtype=np.int64)
    # Each round fills at most one place of every open request; popular windows need few rounds,
    # and a request whose window is too poor is given up after the last.
    for _ in range(50 * per_positive):
        todo = np.flatnonzero((filled < per_positive) & (high > low))
        if not len(todo):
            break
        pick = low[todo] + (rng.random(len(todo)) * (high - low)[todo]).astype(np.int64)
        candidate = items[pick]
        keys = baskets[chosen[todo]] * num_items + candidate
        place = np.minimum(np.searchsorted(in_basket, keys), len(in_basket) - 1)
        repeated = (drawn[todo] == candidate[:, None]).any(axis=1)
        ok = (in_basket[place] != keys) & ~repeated
        drawn[todo[ok], filled[todo[ok]]] = candidate[ok]
        filled[todo[ok]] += 1
    return drawn
