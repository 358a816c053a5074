"""Is one model better than another? The bootstrap of the difference on the same rows.

Shapes: R = rows, N and P = runs of the two sides that differ in their seed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.bootstrap import NUM_BOOTSTRAP_REPLICATES, Labels, Scores, UserDraws, interval
from training.metrics import figures, replicates


@dataclass(frozen=True)
class Difference:
    """One figure of two sides; None where it is not defined on the rows."""

    first: float | None
    """Mean over the first side's runs."""
    second: float | None
    """Mean over the second side's runs."""
    difference: float | None
    """``first - second``; for logloss, below 0 is better."""
    low: float | None
    """Of the 95 % interval of the difference."""
    high: float | None


def compare(
    labels: Labels,
    users: NDArray[np.int64],
    first: Scores,
    second: Scores,
    *,
    seed: int = 0,
    num_replicates: int = NUM_BOOTSTRAP_REPLICATES,
) -> dict[str, Difference]:
    """Differences of AUC, GAUC and logloss with 95 % intervals, users drawn once for both sides.

    A side may hold several runs, usually one per seed: its figure is the mean of the runs' figures,
    in the sample as in every replicate, where all runs of both sides see the same drawn users. The
    interval therefore says how the difference of these runs varies with the users; what another
    seed would give is told by more seeds.

    Args:
        labels: [R], 0 or 1.
        users: [R], any integer code of the user.
        first: Probabilities, [R] or [N, R].
        second: Probabilities of the same rows, [R] or [P, R].
        seed: Of the draws.
        num_replicates: Draws.

    Returns:
        ``auc``, ``gauc``, ``logloss`` -> difference.

    Raises:
        ValueError: If a side has not one probability per row.

    Source:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13: the percentile
        interval of a statistic, here of a difference of two on one resample.
    """
    for name, side in (("first", first), ("second", second)):
        if side.shape[-1] != len(labels):
            raise ValueError(
                f"{name} must hold one probability for each of the {len(labels)} rows, got shape "
                f"{side.shape}"
            )
    draws = UserDraws(users, seed=seed, num_replicates=num_replicates)
    figures_first, figures_second = (figures(labels, side, users) for side in (first, second))
    drawn_first: dict[str, NDArray[np.float64]] = {}
    drawn_second: dict[str, NDArray[np.float64]] = {}
    if draws.num_users > 1:
        drawn_first = replicates(draws, labels, first, users)
        drawn_second = replicates(draws, labels, second, users)
    result = {}
    for name in ("auc", "gauc", "logloss"):
        one, other = figures_first[name], figures_second[name]
        difference = None if one is None or other is None else one - other
        bounds = None
        if drawn_first and difference is not None:
            bounds = interval(drawn_first[name] - drawn_second[name])
        low, high = bounds or (None, None)
        result[name] = Difference(one, other, difference, low, high)
    return result


def compare_slices(
    labels: Labels,
    users: NDArray[np.int64],
    first: Scores,
    second: Scores,
    masks: Mapping[str, NDArray[np.bool_]],
) -> dict[str, dict[str, Difference]]:
    """:func:`compare` on each slice, its own users drawn.

    Args:
        labels: [R], 0 or 1.
        users: [R].
        first: [R] or [N, R].
        second: [R] or [P, R].
        masks: Slice -> bool [R], True = in it.
    """
    return {
        name: compare(labels[mask], users[mask], first[..., mask], second[..., mask])
        for name, mask in masks.items()
    }
