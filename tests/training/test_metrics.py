import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from training.bootstrap import UserDraws, interval
from training.metrics import (
    auc,
    calibration_bins,
    calibration_error,
    figures,
    gauc,
    logloss,
    normalized_entropy,
    replicates,
    summarize,
)


def test_auc_counts_pairs_and_gives_ties_half():
    labels = np.array([1, 0, 1, 0])
    scores = np.array([0.9, 0.9, 0.2, 0.1])
    # Pairs: (.9, .9) half, (.9, .1) won, (.2, .9) lost, (.2, .1) won.
    assert auc(labels, scores) == pytest.approx(2.5 / 4)
    assert auc(np.ones(3, int), np.arange(3.0)) is None
    assert auc(np.array([], int), np.array([])) is None


def test_gauc_by_hand():
    users = np.array([7, 7, 7, 3, 3, 9, 9])
    labels = np.array([1, 0, 0, 1, 0, 1, 1])
    scores = np.array([0.5, 0.6, 0.1, 0.8, 0.8, 0.1, 0.2])
    # User 7: 1 of 2 pairs, 3 rows; user 3: a tie, 2 rows; user 9 has one class only.
    assert gauc(labels, scores, users) == pytest.approx((3 * 0.5 + 2 * 0.5) / 5)
    assert gauc(labels[5:], scores[5:], users[5:]) is None


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 1), st.integers(0, 5)), min_size=1, max_size=60
    )
)
def test_gauc_equals_the_weighted_mean_of_scikit_learns_auc(rows):
    users, labels, scores = (np.array(column) for column in zip(*rows, strict=True))
    values, weights = [], []
    for user in set(users):
        mine = users == user
        if len(set(labels[mine])) == 2:
            values.append(roc_auc_score(labels[mine], scores[mine]))
            weights.append(mine.sum())
    expected = np.average(values, weights=weights) if values else None
    assert gauc(labels, scores.astype(float), users) == pytest.approx(expected)


def test_logloss_and_normalized_entropy_by_hand():
    labels = np.array([1, 0, 0, 0])
    chances = np.array([0.5, 0.25, 0.25, 0.5])
    expected = -(np.log(0.5) + np.log(0.75) + np.log(0.75) + np.log(0.5)) / 4
    assert logloss(labels, chances) == pytest.approx(expected)
    assert logloss(labels, chances) == pytest.approx(log_loss(labels, chances))
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    assert normalized_entropy(labels, chances) == pytest.approx(expected / entropy)
    assert normalized_entropy(labels, np.full(4, 0.25)) == pytest.approx(1)
    assert normalized_entropy(np.zeros(3, int), np.full(3, 0.2)) is None


def test_calibration_error_by_hand():
    labels = np.array([0, 1, 1, 1])
    chances = np.array([0.2, 0.4, 0.9, 0.7])
    # Bins (.2, .4) and (.7, .9): |.3 - .5| / 2 + |.8 - 1| / 2.
    assert calibration_error(labels, chances, num_bins=2) == pytest.approx(0.2)
    assert calibration_error(labels, labels.astype(float)) == pytest.approx(0)
    means, rates, sizes = calibration_bins(labels, chances, num_bins=3)
    assert means == pytest.approx([0.3, 0.7, 0.9])
    assert (rates.tolist(), sizes.tolist()) == ([0.5, 1, 1], [2, 1, 1])


def test_replicates_equal_the_figures_of_the_drawn_rows():
    """Drawing a user twice is having that user's rows twice, under two names."""
    generator = np.random.default_rng(3)
    users = generator.integers(10, 40, 400)
    labels = generator.integers(0, 2, 400)
    chances = (1 + generator.integers(0, 9, 400) + labels) / 12
    found = replicates(UserDraws(users, seed=5, num_replicates=20), labels, chances, users)
    draw = np.random.default_rng(5)
    names = np.unique(users)
    for replicate in range(20):
        drawn = names[draw.integers(len(names), size=len(names))]
        rows = [np.flatnonzero(users == user) for user in drawn]
        copies = np.repeat(np.arange(len(drawn)), [len(r) for r in rows])
        rows = np.concatenate(rows)
        assert found["auc"][replicate] == pytest.approx(roc_auc_score(labels[rows], chances[rows]))
        assert found["gauc"][replicate] == pytest.approx(gauc(labels[rows], chances[rows], copies))
        assert found["logloss"][replicate] == pytest.approx(log_loss(labels[rows], chances[rows]))


def test_the_interval_is_of_percentiles_and_leaves_out_what_is_not_defined():
    values = np.r_[np.arange(101.0), np.nan]
    assert interval(values) == pytest.approx((2.5, 97.5))
    assert interval(values, coverage=0.5) == pytest.approx((25, 75))
    assert interval(np.array([np.nan])) is None


def test_bootstrap_by_user_is_wider_than_by_row_where_users_differ():
    generator = np.random.default_rng(0)
    users = np.repeat(np.arange(40), 50)
    labels = generator.integers(0, 2, 2000)
    direction = generator.choice([-1, 1], 40)[users]
    scores = labels * direction + generator.normal(size=2000)
    by_user = interval(UserDraws(users).auc(labels, scores))
    by_row = interval(UserDraws(np.arange(2000)).auc(labels, scores))
    assert by_user[1] - by_user[0] > 2 * (by_row[1] - by_row[0])


def test_all_intervals_of_100_000_rows_take_seconds():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 100_000)
    chances = 1 / (1 + np.exp(-generator.normal(size=100_000) - labels))
    start = time.process_time()
    summary = summarize(labels, chances, generator.integers(0, 3000, 100_000))
    assert time.process_time() - start < 5
    for name in ("auc", "gauc", "logloss"):
        assert summary[f"{name}_low"] < summary[name] < summary[f"{name}_high"]


def test_figures_of_several_runs_are_their_means():
    generator = np.random.default_rng(1)
    users, labels = generator.integers(0, 20, 300), generator.integers(0, 2, 300)
    runs = generator.random((3, 300))
    mean, each = summarize(labels, runs, users), [figures(labels, run, users) for run in runs]
    for name in ("auc", "gauc", "logloss", "ne", "calibration_error"):
        assert mean[name] == pytest.approx(np.mean([of_run[name] for of_run in each]))
    # Same users drawn: the mean of three differs less from draw to draw than one does.
    alone = summarize(labels, runs[0], users)
    assert mean["auc_high"] - mean["auc_low"] < alone["auc_high"] - alone["auc_low"]


def test_summary_says_none_where_a_figure_is_not_defined():
    summary = summarize(np.array([1, 1]), np.array([0.5, 0.9]), np.array([0, 1]))
    assert summary["num_rows"] == 2
    assert summary["auc"] is summary["auc_low"] is summary["gauc"] is summary["ne"] is None
    assert summary["gauc_low"] is None
    assert summary["logloss_low"] == pytest.approx(-np.log(0.9))
    assert summary["logloss"] == pytest.approx(-(np.log(0.5) + np.log(0.9)) / 2)
    empty = summarize(np.array([], int), np.array([]), np.array([], int))
    assert empty["num_rows"] == 0
    assert empty["logloss"] is None
