import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from training.metrics import (
    auc,
    bootstrap_auc_interval,
    calibration_error,
    gauc,
    logloss,
    normalized_entropy,
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


def test_bootstrap_replicates_equal_scikit_learns_weighted_auc():
    generator = np.random.default_rng(3)
    users = generator.integers(0, 30, 400)
    labels = generator.integers(0, 2, 400)
    scores = generator.integers(0, 9, 400) / 9 + labels * 0.1
    values = []
    draw = np.random.default_rng(5)
    for _ in range(50):
        weights = np.bincount(draw.integers(30, size=30), minlength=30)[users]
        values.append(roc_auc_score(labels, scores, sample_weight=weights))
    found = bootstrap_auc_interval(labels, scores, users, seed=5, num_replicates=50)
    assert found == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))


def test_bootstrap_by_user_is_wider_than_by_row_where_users_differ():
    generator = np.random.default_rng(0)
    users = np.repeat(np.arange(40), 50)
    labels = generator.integers(0, 2, 2000)
    direction = generator.choice([-1, 1], 40)[users]
    scores = labels * direction + generator.normal(size=2000)
    by_user = bootstrap_auc_interval(labels, scores, users)
    by_row = bootstrap_auc_interval(labels, scores, np.arange(2000))
    assert by_user[1] - by_user[0] > 2 * (by_row[1] - by_row[0])


def test_bootstrap_of_100_000_rows_takes_seconds():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 100_000)
    scores = generator.normal(size=100_000) + labels
    start = time.process_time()
    low, high = bootstrap_auc_interval(labels, scores, generator.integers(0, 3000, 100_000))
    assert time.process_time() - start < 10
    assert low < roc_auc_score(labels, scores) < high


def test_summary_says_none_where_a_figure_is_not_defined():
    summary = summarize(np.array([1, 1]), np.array([0.5, 0.9]), np.array([0, 1]))
    assert summary["num_rows"] == 2
    assert summary["auc"] is summary["auc_low"] is summary["gauc"] is summary["ne"] is None
    assert summary["logloss"] == pytest.approx(-(np.log(0.5) + np.log(0.9)) / 2)
    empty = summarize(np.array([], int), np.array([]), np.array([], int))
    assert empty["num_rows"] == 0
    assert empty["logloss"] is None
