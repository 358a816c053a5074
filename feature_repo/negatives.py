"""Labels where no impressions were logged: each purchase against items drawn by recent popularity.

A sampler that leaks an item's trend flatters every model, so the negatives of a request come from
the positives of the days just before it, and a positive that could not have been drawn as a
negative is left out.
"""

from dataclasses import dataclass
from functools import cached_property

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
    pool = _Pool(positives, options)
    rng = np.random.default_rng(options.seed)
    names = bounds.names(pool.times)
    rows: list[NDArray[np.int64]] = []
    for split in _SPLITS:
        of_split = np.flatnonzero(pool.drawable & (names == split))
        if not len(of_split):
            raise DataSetError(
                f"no request can be sampled for the {split} split: expected purchases whose item "
                f"was also sold in the {options.window_days} days before; check [split]"
            )
        limit = options.max_requests.get(split, len(of_split))  # type: ignore[call-overload]
        if limit < len(of_split):
            of_split = np.sort(rng.choice(of_split, size=limit, replace=False))
        rows.append(of_split)
    requests = pool.requests(np.concatenate(rows), rng)
    return requests.assign(split=bounds.names(requests["event_timestamp"].to_numpy(np.int64)))


def sample_extra(
    positives: pd.DataFrame, options: Negatives, bounds: SplitBounds, covered: pd.DataFrame
) -> pd.DataFrame:
    """Requests of the train split's positives that are in no impression yet.

    Args:
        positives: As for :func:`sample_impressions`.
        options: Numbers and seed.
        bounds: The time split.
        covered: user_id, item_id, event_timestamp (int64) of impressions that were clicked.

    Returns:
        As :func:`sample_impressions`, with the split ``extra``; no rows where all are covered.
    """
    pool = _Pool(positives, options)
    keys = ["user_id", "item_id", "event_timestamp"]
    is_new = ~pd.MultiIndex.from_frame(pool.positives[keys]).isin(
        pd.MultiIndex.from_frame(covered[keys])
    )
    of_train = bounds.names(pool.times) == "train"
    rng = np.random.default_rng([options.seed, 1])  # not the draws of sample_impressions again
    requests = pool.requests(np.flatnonzero(pool.drawable & of_train & is_new), rng)
    return requests.assign(request_id="extra-" + requests["request_id"], split="extra")


class _Pool:
    """The positives in order of time, ready to be drawn from.

    Args:
        positives: See :func:`sample_impressions`.
        options: Numbers.
    """

    def __init__(self, positives: pd.DataFrame, options: Negatives) -> None:
        order = ["event_timestamp", "user_id", "item_id"]
        self.positives = positives.sort_values(order, kind="stable")
        self.per_positive = options.per_positive
        self.window_us = options.window_days * _DAY_US
        self.times = self.positives["event_timestamp"].to_numpy(np.int64)
        self.item_ids, self.items = np.unique(
            self.positives["item_id"].to_numpy(str), return_inverse=True
        )
        users = pd.factorize(self.positives["user_id"])[0].astype(np.int64)
        pairs = pd.MultiIndex.from_arrays([users, self.times])
        self.baskets = pd.factorize(pairs)[0].astype(np.int64)

    @cached_property
    def drawable(self) -> NDArray[np.bool_]:
        """Whether a positive's item was also sold in the window before it."""
        by_item = np.lexsort((self.times, self.items))
        sorted_items, sorted_times = self.items[by_item], self.times[by_item]
        # The nearest earlier sale of the same item, strictly before.
        first = np.searchsorted(sorted_items, sorted_items, side="left")
        earlier = _first_of_equal(sorted_items, sorted_times) - 1
        has_earlier = earlier >= first
        gap = sorted_times - sorted_times[np.maximum(earlier, 0)]
        drawable = np.empty(len(self.times), dtype=bool)
        drawable[by_item] = has_earlier & (gap <= self.window_us)
        return drawable

    def requests(self, chosen: NDArray[np.int64], rng: np.random.Generator) -> pd.DataFrame:
        """The impressions of these positives, but for the split; incomplete requests are left out.

        Args:
            chosen: int64; positions in order of time.
            rng: Source of all draws.
        """
        negatives = _draw(
            self.times, self.items, self.baskets, chosen, self.window_us, self.per_positive, rng
        )
        complete = (negatives >= 0).all(axis=1)
        chosen, negatives = chosen[complete], negatives[complete]
        candidates = np.concatenate([self.items[chosen][:, None], negatives], axis=1)
        order = rng.random(candidates.shape).argsort(axis=1)
        width = candidates.shape[1]
        return pd.DataFrame(
            {
                "request_id": np.repeat(np.arange(len(chosen)).astype(str), width),
                "user_id": np.repeat(self.positives["user_id"].to_numpy(object)[chosen], width),
                "item_id": self.item_ids[np.take_along_axis(candidates, order, axis=1).ravel()],
                "event_timestamp": np.repeat(self.times[chosen], width),
                "clicked": (order == 0).astype(np.int8).ravel(),
            }
        )


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
