"""How good click probabilities are: ranking, calibration, and how sure the figures are.

Shapes: R = labelled rows, U = distinct users.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import log_loss, roc_auc_score

NUM_CALIBRATION_BINS = 10
NUM_BOOTSTRAP_REPLICATES = 200

Labels = NDArray[np.integer[Any]]
Scores = NDArray[np.floating[Any]]


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
    Cost: one sort.

    Args:
        labels: [R], 0 or 1.
        scores: [R].
        users: [R], any integer code of the user.

    Returns:
        In ``[0, 1]``; None where no user has both classes.

    Source:
        Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, eq. 7.
    """
    if not labels.size:
        return None
    order = np.lexsort((scores, users))
    labels, scores, users = labels[order].astype(np.float64), scores[order], users[order]
    new_user = np.r_[True, users[1:] != users[:-1]]
    new_value = new_user | np.r_[True, scores[1:] != scores[:-1]]
    starts = np.flatnonzero(new_value)
    ends = np.r_[starts[1:], len(labels)]
    # Tied scores share the mean of their positions; the user's first position is taken off below.
    positions = ((starts + ends - 1) / 2)[np.cumsum(new_value) - 1]
    first = np.flatnonzero(new_user)
    counts = np.diff(np.r_[first, len(labels)])
    positives = np.add.reduceat(labels, first)
    negatives = counts - positives
    both = (positives > 0) & (negatives > 0)
    if not both.any():
        return None
    ranks = np.add.reduceat(labels * positions, first) - positives * first
    wins = ranks[both] - positives[both] * (positives[both] - 1) / 2
    per_user = wins / (positives[both] * negatives[both])
    return float(np.average(per_user, weights=counts[both]))


def logloss(labels: Labels, probabilities: Scores) -> float | None:
    """Mean of ``-log`` of the probability given to what happened, nats; None without rows."""
    if not labels.size:
        return None
    return float(log_loss(labels, probabilities.astype(np.float64), labels=[0, 1]))


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


def calibration_error(
    labels: Labels, probabilities: Scores, *, num_bins: int = NUM_CALIBRATION_BINS
) -> float | None:
    """Expected calibration error over bins of equal mass.

    ``sum_b |mean probability of b - click rate of b| * share of rows in b``, the bins cut from the
    rows sorted by probability.
    """
    if not labels.size:
        return None
    order = np.argsort(probabilities, kind="stable")
    gaps = np.asarray(probabilities, dtype=np.float64)[order] - labels[order]
    bins = np.array_split(gaps, num_bins)
    return float(sum(abs(part.sum()) for part in bins) / labels.size)


def bootstrap_auc_interval(
    labels: Labels,
    scores: Scores,
    users: NDArray[np.int64],
    *,
    seed: int = 0,
    num_replicates: int = NUM_BOOTSTRAP_REPLICATES,
    coverage: float = 0.95,
) -> tuple[float, float] | None:
    """Percentile interval of the AUC when whole users are drawn with replacement.

    Rows of one user hang together, so drawing rows would make the interval too narrow. A drawn
    user is a weight, so the scores are sorted once and a replicate costs O(R).

    Args:
        labels: [R], 0 or 1.
        scores: [R].
        users: [R], any integer code of the user.
        seed: Of the draws.
        num_replicates: Draws.
        coverage: In ``(0, 1)``.

    Returns:
        (low, high), or None where fewer than two users or one class only is present.
    """
    _, codes = np.unique(users, return_inverse=True)
    num_users = int(codes.max()) + 1 if codes.size else 0
    if num_users < 2 or not _has_both_classes(labels):
        return None
    order = np.argsort(scores, kind="stable")
    codes = codes[order]
    clicked = labels[order].astype(np.float64)
    ties = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(num_replicates):
        draws = np.bincount(generator.integers(num_users, size=num_users), minlength=num_users)
        weights = draws[codes].astype(np.float64)
        positives = np.add.reduceat(weights * clicked, ties)
        negatives = np.add.reduceat(weights, ties) - positives
        below = np.cumsum(negatives) - negatives
        pairs = positives.sum() * negatives.sum()
        if pairs > 0:
            values.append(float((positives * (below + negatives / 2)).sum() / pairs))
    if not values:
        return None
    tail = (1 - coverage) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def summarize(
    labels: Labels,
    probabilities: Scores,
    users: NDArray[np.int64],
    *,
    interval: bool = True,
) -> dict[str, float | int | None]:
    """Every figure of this module; None where a figure is not defined on these rows.

    Args:
        labels: [R], 0 or 1.
        probabilities: [R], in ``[0, 1]``.
        users: [R], any integer code of the user.
        interval: Also draw the bootstrap interval of the AUC.
    """
    bounds = bootstrap_auc_interval(labels, probabilities, users) if interval else None
    return {
        "num_rows": int(labels.size),
        "num_clicked": int(labels.sum()),
        "num_users": int(np.unique(users).size),
        "auc": auc(labels, probabilities),
        "auc_low": bounds[0] if bounds else None,
        "auc_high": bounds[1] if bounds else None,
        "gauc": gauc(labels, probabilities, users),
        "logloss": logloss(labels, probabilities),
        "ne": normalized_entropy(labels, probabilities),
        "calibration_error": calibration_error(labels, probabilities),
    }
