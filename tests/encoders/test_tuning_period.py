"""No labelled time by default, and a measure on what comes after."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoders.tuning_period import (
    choose_until,
    held_out_pairs,
    next_basket_auc,
    seen_labels,
)
from feature_repo.manifest import load_manifest
from tests.encoders.planted import DAY, START, TEST, VALID, make_home, planted


def test_the_period_ends_at_the_first_training_impression(tmp_path: Path) -> None:
    events = planted(START, 120, seed=0)
    first = START + 30 * DAY
    times = {"train": first, "valid": VALID, "test": TEST}
    home = make_home(tmp_path / "home", events, times)
    about = load_manifest(home)
    assert choose_until(home, about, min_events=540) == first  # 6 users, 30 days, 3 texts
    assert choose_until(home, about, min_events=541) == VALID
    assert seen_labels(home, first) == {}
    assert seen_labels(home, VALID) == {"train": 1}
    assert seen_labels(home, TEST + DAY) == {"train": 1, "valid": 1, "test": 1}
    # Measured up to the validation period; from there up to the test period; never on that.
    assert len(held_out_pairs(home, about, first)) == 6 * 49
    assert len(held_out_pairs(home, about, VALID)) == 6 * 19
    assert held_out_pairs(home, about, TEST) == []
    home.impressions.unlink()
    assert choose_until(home, about) == VALID
    assert seen_labels(home, VALID) == {}


def test_the_auc_by_hand() -> None:
    vectors = {"a": [1.0, 0.0], "b": [0.8, 0.6], "c": [0.0, 2.0], "d": [-1.0, 0.0]}

    def encode(texts: list[str]) -> Any:
        return np.array([vectors[text] for text in texts], dtype=np.float32)

    # From a: b, c, d. From c: b, then a and d at the same cosine, which is not farther.
    assert next_basket_auc([("a", "d"), ("c", "b"), ("c", "a"), ("a", "c")], encode) == (
        pytest.approx((0 + 1 + 0 + 1 / 2) / 4)
    )
    assert next_basket_auc([], encode) is None
