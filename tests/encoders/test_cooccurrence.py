"""Pairs by hand, the bounds on them, and the draw of partners."""

from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from encoders.cooccurrence import NEXT_BASKET, SAME_BASKET, count_pairs
from feature_repo.errors import DataSetError
from feature_repo.home import Home
from tests.encoders.planted import DAY, START, make_home, sparse


def counted(
    home: Home, stop: datetime, gaps: list[int], **changes: int
) -> dict[tuple[str, str], float]:
    data = count_pairs(home, start=START, stop=stop, gaps=gaps, **changes)
    every = data.block(np.arange(len(data.texts)))
    return {
        (data.texts[i], data.texts[j]): float(every[i, j]) for i, j in np.argwhere(every).tolist()
    }


def test_pairs_are_counted_per_basket(tmp_path: Path) -> None:
    events = [
        ("u", START, "a"),
        ("u", START, "b"),
        ("u", START, "b"),  # the same text twice at one moment is one
        ("u", START + DAY, "a"),
        ("u", START + 2 * DAY, "c"),
        ("v", START, "a"),
        ("v", START + DAY, "b"),
        ("v", START + 3 * DAY, "d"),
    ]
    home = make_home(tmp_path / "home", events, {})
    same = {("a", "b"): 1, ("b", "a"): 1}
    following = {("b", "a"): 1, ("a", "c"): 1, ("a", "b"): 1}
    stop = START + 3 * DAY
    assert counted(home, stop, [SAME_BASKET]) == same
    assert counted(home, stop, [NEXT_BASKET]) == following
    both = counted(home, stop, [SAME_BASKET, NEXT_BASKET])
    assert both == {("a", "b"): 2, ("b", "a"): 2, ("a", "c"): 1}
    data = count_pairs(home, start=START, stop=stop, gaps=[SAME_BASKET])
    assert dict(zip(data.texts, data.num_baskets.tolist(), strict=True)) == {"a": 3, "b": 2, "c": 1}
    with pytest.raises(DataSetError, match="no events before 2024-01-01T00:00:00"):
        count_pairs(home, start=START, stop=START, gaps=[SAME_BASKET])
    alone = make_home(tmp_path / "alone", [("u", START, "a"), ("v", START, "b")], {})
    with pytest.raises(DataSetError, match="no two texts go together before"):
        count_pairs(alone, start=START, stop=stop, gaps=[SAME_BASKET, NEXT_BASKET])


def test_large_baskets_and_many_pairs_are_bounded(tmp_path: Path) -> None:
    events = [(f"u{user}", START, f"t{n}") for user in range(40) for n in range(10)]
    home = make_home(tmp_path / "home", events, {})
    stop = START + DAY
    assert sum(counted(home, stop, [SAME_BASKET]).values()) == 40 * 10 * 9
    capped = counted(home, stop, [SAME_BASKET], largest_basket=4)
    assert sum(capped.values()) == 40 * 4 * 3
    assert len({text for pair in capped for text in pair}) == 10  # not the same four each time
    data = count_pairs(home, start=START, stop=stop, gaps=[SAME_BASKET], max_pairs=2000)
    assert data.user_share == 0.5
    assert 0 < data.counts.sum() < 40 * 10 * 9
    assert data.counts.sum() % (10 * 9) == 0  # whole users


def test_partners_are_drawn_by_their_counts() -> None:
    data = sparse(5, {0: {1: 3.0, 4: 1.0}, 2: {3: 1.0}})
    random = np.random.default_rng(0)
    drawn = data.draw_partners(np.tile([0, 1, 2, 3], 2000), random)
    assert len(drawn) == 4000  # texts 1 and 3 have none
    of_first, of_third = drawn[::2], drawn[1::2]
    assert set(of_third.tolist()) == {3}
    assert set(of_first.tolist()) == {1, 4}
    assert (of_first == 1).mean() == pytest.approx(0.75, abs=0.04)
