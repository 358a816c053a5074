"""How good click probabilities are: ranking, calibration, and how sure the figures are.

Shapes: R = labelled rows, U = distinct users, N = runs that differ in their seed, K = replicates.
"""

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from training.bootstrap import Labels, Scores, UserDraws, interval

NUM_CALIBRATION_BINS = 10


def _has_both_classes(labels: Labels) -> bool:
    return bool(labels.size) and bool(labels.min() != labels.max())


def auc(labels: Labels, scores: Scores) -> float | None:
    """Area under the ROC curve: P(a clicked row scores above one that was not), ties half.

    Args:
        labels: [R], 0 or 1.
        scores: [R], any monotone score.

    Returns:
        In ``[0, 1]``; None where only one class is present.
    """
    return float(roc_auc_score(labels, scores)) if _has_both_classes(labels) else None


def gauc(labels: Labels, scores: Scores, users: NDArray[np.int64]) -> float | None:
    """AUC of every user on their own rows, averaged with the number of rows as weight.

    Users with one class only have no AUC and are left out, from the weights too.

    Args:
        labels: [R], 0 or 1.
        scores: [R].
        users: [R], any integer code of the user.

    Returns:
        In ``[0, 1]``; None where no user has both classes.

    Source:
        Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, eq. 7.
    """
    weighted, weights = user_aucs(labels, scores, users)
    return float(weighted.sum() / weights.sum()) if weights.any() else None


def user_aucs(
    labels: Labels, scores: Scores, users: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The parts of :func:`gauc` by user; one sort.

    Returns:
        AUC times rows [U] and rows [U], in the order of ``numpy.unique(users)``; both 0 for a user
        with one class only.
    """
    if not labels.size:
        return np.empty(0), np.empty(0)
    order = np.lexsort((scores, users))
    labels, scores, users = labels[order].astype(np.float64), scores[order], users[order]
    new_user = np.r_[True, users[1:] != users[:-1]]
    new_value = new_user | np.r_[True, scores[1:] != scores[:-1]]
    starts = np.flatnonzero(new_value)
    ends = np.r_[starts[1:], len(labels)]
    # Tied scores share the mean of their positions; the user's first position is taken off below.
    positions = ((starts + ends - 1) / 2)[np.cumsum(new_value) - 1]
    first = np.flatnonzero(new_user)
    counts = np.diff(np.r_[first, len(labels)]).astype(np.float64)
    positives = np.add.reduceat(labels, first)
    pairs = positives * (counts - positives)
    ranks = np.add.reduceat(labels * positions, first) - positives * first
    wins = ranks - positives * (positives - 1) / 2
    both = pairs > 0
    return np.where(both, wins * counts / np.where(both, pairs, 1), 0.0), counts * both


def row_losses(labels: Labels, probabilities: Scores) -> NDArray[np.float64]:
    """``-log`` of the probability given to what happened, nats, [R]; never infinite."""
    chances = np.where(labels == 1, probabilities, 1 - probabilities.astype(np.float64))
    return -np.log(np.maximum(chances, np.finfo(np.float64).eps))


def logloss(labels: Labels, probabilities: Scores) -> float | None:
    """Mean of :func:`row_losses`; None without rows."""
    return float(row_losses(labels, probabilities).mean()) if labels.size else None


def normalized_entropy(labels: Labels, probabilities: Scores) -> float | None:
    """Logloss over the entropy of the base rate: below 1 is better than a constant.

    Returns:
        None where only one class is present, for then the entropy is 0.

    Source:
        He et al., "Practical Lessons from Predicting Clicks on Ads at Facebook", ADKDD 2014, eq. 3.
    """
    if not _has_both_classes(labels):
        return None
    rate = float(labels.mean())
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    value = logloss(labels, probabilities)
    assert value is not None
    return value / float(entropy)


def calibration_bins(
    labels: Labels, probabilities: Scores, *, num_bins: int = NUM_CALIBRATION_BINS
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Bins of equal mass, cut from the rows sorted by probability.

    Returns:
        Mean probability, click rate and number of rows of each bin that has any, ascending.
    """
    order = np.argsort(probabilities, kind="stable")
    bins = [rows for rows in np.array_split(order, num_bins) if rows.size]
    means = [float(np.mean(probabilities[rows], dtype=np.float64)) for rows in bins]
    rates = [float(labels[rows].mean()) for rows in bins]
    return np.array(means), np.array(rates), np.array([rows.size for rows in bins], dtype=np.int64)


def calibration_error(
    labels: Labels, probabilities: Scores, *, num_bins: int = NUM_CALIBRATION_BINS
) -> float | None:
    """Expected calibration error over bins of equal mass; None without rows.

    ``sum_b |mean probability of b - click rate of b| * share of rows in b``.
    """
    if not labels.size:
        return None
    means, rates, sizes = calibration_bins(labels, probabilities, num_bins=num_bins)
    return float(np.abs(means - rates) @ sizes / labels.size)


def replicates(
    draws: UserDraws, labels: Labels, probabilities: Scores, users: NDArray[np.int64]
) -> dict[str, NDArray[np.float64]]:
    """AUC, GAUC and logloss in every bootstrap replicate, [K] each.

    With several runs a replicate's figure is the mean of the runs' figures on the drawn users: the
    interval says how the mean over these seeds varies with the users, not with the seed.

    Args:
        draws: Of ``users``.
        labels: [R], 0 or 1.
        probabilities: [R] or [N, R], in ``[0, 1]``.
        users: [R], any integer code of the user.
    """
    rows = np.bincount(draws.codes, minlength=draws.num_users).astype(np.float64)

    def losses(run: Scores) -> NDArray[np.float64]:
        sums = np.bincount(draws.codes, row_losses(labels, run), minlength=draws.num_users)
        return sums.astype(np.float64)

    runs = np.atleast_2d(probabilities)
    return {
        "auc": np.mean([draws.auc(labels, run) for run in runs], axis=0),
        "gauc": np.mean([draws.ratio(*user_aucs(labels, run, users)) for run in runs], axis=0),
        "logloss": np.mean([draws.ratio(losses(run), rows) for run in runs], axis=0),
    }


def figures(
    labels: Labels, probabilities: Scores, users: NDArray[np.int64]
) -> dict[str, float | None]:
    """The figures of this module, the mean over runs where there are several.

    Args:
        labels: [R], 0 or 1.
        probabilities: [R] or [N, R], in ``[0, 1]``.
        users: [R], any integer code of the user.

    Returns:
        Name -> value; None where a figure is not defined on these rows.
    """
    runs = [
        {
            "auc": auc(labels, run),
            "gauc": gauc(labels, run, users),
            "logloss": logloss(labels, run),
            "ne": normalized_entropy(labels, run),
            "calibration_error": calibration_error(labels, run),
        }
        for run in np.atleast_2d(probabilities)
    ]
    means: dict[str, float | None] = {}
    for name in runs[0]:
        values = [run[name] for run in runs]  # whether a figure is defined depends on labels alone
        defined = [value for value in values if value is not None]
        means[name] = float(np.mean(defined)) if defined else None
    return means


def summarize(
    labels: Labels,
    probabilities: Scores,
    users: NDArray[np.int64],
    *,
    with_intervals: bool = True,
) -> dict[str, float | int | None]:
    """Every figure of this module; AUC, GAUC and logloss with 95 % user-bootstrap intervals.

    Args:
        labels: [R], 0 or 1.
        probabilities: [R] or [N, R], in ``[0, 1]``; N runs give the mean of their figures.
        users: [R], any integer code of the user.
        with_intervals: Also draw the intervals: 0.4 s per run of 100,000 rows.

    Returns:
        Figure -> value, ``<figure>_low`` and ``<figure>_high``; None where it is not defined.
    """
    summary: dict[str, float | int | None] = {
        "num_rows": int(labels.size),
        "num_clicked": int(labels.sum()),
        "num_users": int(np.unique(users).size),
    }
    values = figures(labels, probabilities, users)
    draws = UserDraws(users)
    # Drawing from one user alone says nothing about others.
    with_intervals = with_intervals and draws.num_users > 1
    drawn = replicates(draws, labels, probabilities, users) if with_intervals else {}
    for name, value in values.items():
        summary[name] = value
        if name in ("auc", "gauc", "logloss"):
            bounds = interval(drawn[name]) if name in drawn and value is not None else None
            summary[f"{name}_low"], summary[f"{name}_high"] = bounds or (None, None)
    return summary
