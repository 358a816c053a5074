import numpy as np
import pytest

from training.bootstrap import UserDraws, interval
from training.comparison import compare, compare_slices
from training.metrics import auc, gauc, logloss


def rows(seed=0, num=600, users=30):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, num)
    signal = generator.normal(size=num) + labels
    chances = 1 / (1 + np.exp(-signal))
    return generator, labels, generator.integers(0, users, num), chances


def test_differences_of_the_figures_themselves():
    generator, labels, users, first = rows()
    second = generator.random(600)
    found = compare(labels, users, first, second)
    for name, one, other in (
        ("auc", auc(labels, first), auc(labels, second)),
        ("gauc", gauc(labels, first, users), gauc(labels, second, users)),
        ("logloss", logloss(labels, first), logloss(labels, second)),
    ):
        assert (found[name].first, found[name].second) == pytest.approx((one, other))
        assert found[name].difference == pytest.approx(one - other)
        assert found[name].low < found[name].difference < found[name].high


def test_a_model_does_not_differ_from_itself():
    _, labels, users, chances = rows()
    for value in compare(labels, users, chances, chances).values():
        assert value.difference == value.low == value.high == 0


def test_the_sides_can_be_exchanged():
    generator, labels, users, first = rows()
    second = generator.random(600)
    there, back = compare(labels, users, first, second), compare(labels, users, second, first)
    for name in there:
        assert there[name].difference == pytest.approx(-back[name].difference)
        assert (there[name].low, there[name].high) == pytest.approx(
            (-back[name].high, -back[name].low)
        )


def test_pairing_finds_a_small_difference_that_two_intervals_would_hide():
    generator, labels, users, first = rows(num=4000, users=200)
    second = np.clip(first + generator.normal(size=4000) * 0.03, 0.001, 0.999)
    found = compare(labels, users, first, second)["auc"]
    assert found.low > 0
    alone = [interval(UserDraws(users).auc(labels, side)) for side in (first, second)]
    assert alone[0][0] < alone[1][1]  # the two intervals overlap


def test_seeds_of_a_side_are_averaged_inside_every_draw():
    generator, labels, users, _ = rows()
    first, second = generator.random((3, 600)), generator.random((2, 600))
    found = compare(labels, users, first, second, seed=4, num_replicates=30)["auc"]
    draws = UserDraws(users, seed=4, num_replicates=30)
    expected = np.mean([draws.auc(labels, run) for run in first], axis=0) - np.mean(
        [draws.auc(labels, run) for run in second], axis=0
    )
    assert (found.low, found.high) == pytest.approx(interval(expected))
    means = [np.mean([auc(labels, run) for run in side]) for side in (first, second)]
    assert found.difference == pytest.approx(means[0] - means[1])


def test_slices_are_compared_on_their_own_rows():
    generator, labels, users, first = rows()
    second = generator.random((2, 600))
    half = np.arange(600) < 300
    masks = {"half": half, "nothing": np.zeros(600, dtype=bool), "one user": users == 3}
    found = compare_slices(labels, users, first, second, masks)
    assert found["half"] == compare(labels[half], users[half], first[half], second[:, half])
    assert found["nothing"]["auc"].difference is None
    assert found["nothing"]["logloss"].low is None
    assert found["one user"]["logloss"].difference is not None
    assert found["one user"]["logloss"].low is None  # one user says nothing about others


def test_sides_of_other_rows_are_refused():
    _, labels, users, first = rows()
    with pytest.raises(ValueError, match=r"second must hold one probability for each of the 600"):
        compare(labels, users, first, first[:-1])
