"""How sure a figure is: whole users drawn with replacement, the same draws for every figure.

Rows of one user hang together, so drawing rows would make intervals too narrow. A drawn user is a
weight on the user's rows, so nothing is copied and scores are sorted once.

Shapes: R = rows, U = distinct users, K = replicates.

Source:
    Field and Welsh, "Bootstrapping clustered data", JRSS B 2007, section 3: clusters are drawn,
    their rows are kept as they are. Intervals are percentiles of the replicates.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_BOOTSTRAP_REPLICATES = 200
COVERAGE = 0.95

Labels = NDArray[np.integer[Any]]
Scores = NDArray[np.floating[Any]]


class UserDraws:
    """K draws of U users with replacement; memory holds one draw at a time.

    Two sets of scores of the same rows that are given to one object see the same drawn users, which
    is what makes a comparison a paired one.

    Args:
        users: [R], any integer code of the user.
        seed: Of the draws.
        num_replicates: K, at least 1.
    """

    def __init__(
        self,
        users: NDArray[np.int64],
        *,
        seed: int = 0,
        num_replicates: int = NUM_BOOTSTRAP_REPLICATES,
    ) -> None:
        if num_replicates < 1:
            raise ValueError(f"num_replicates must be at least 1, got {num_replicates}")
        distinct, self.codes = np.unique(users, return_inverse=True)
        self.num_users = len(distinct)
        self.num_replicates = num_replicates
        self._seed = seed

    def _draws(self) -> Iterator[NDArray[np.int64]]:
        """How often each user was drawn, [U], K times."""
        generator = np.random.default_rng(self._seed)
        for _ in range(self.num_replicates):
            drawn = generator.integers(self.num_users, size=self.num_users)
            yield np.bincount(drawn, minlength=self.num_users)

    def auc(self, labels: Labels, scores: Scores) -> NDArray[np.float64]:
        """The area under the ROC curve in every replicate; O(R) each after one sort.

        Args:
            labels: [R], 0 or 1.
            scores: [R].

        Returns:
            [K]; NaN where a draw holds one class only.
        """
        order = np.argsort(scores, kind="stable")
        codes = self.codes[order]
        clicked = labels[order].astype(bool)
        ends = np.flatnonzero(np.r_[np.diff(scores[order]) != 0, True])  # of each tie
        values = np.full(self.num_replicates, np.nan)
        for replicate, draw in enumerate(self._draws()):
            weights = draw[codes]
            # Running sums at the ends of the ties: whole numbers, so nothing is rounded.
            all_rows = np.cumsum(weights)[ends]
            positives = np.cumsum(np.where(clicked, weights, 0))[ends]
            negatives = all_rows - positives
            pairs = float(positives[-1]) * float(negatives[-1])
            if pairs > 0:
                below = np.r_[0, negatives[:-1]] + negatives  # twice the negatives won against
                values[replicate] = np.dot(np.diff(positives, prepend=0), below) / 2 / pairs
        return values

    def ratio(
        self, numerators: NDArray[np.float64], denominators: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """A ratio of sums over users in every replicate; O(U) each.

        Args:
            numerators: [U], in the order of ``numpy.unique(users)``.
            denominators: [U], at least 0.

        Returns:
            [K]; NaN where the denominators of a draw are 0 together.
        """
        values = np.full(self.num_replicates, np.nan)
        for replicate, draw in enumerate(self._draws()):
            weight = float(draw @ denominators)
            if weight > 0:
                values[replicate] = float(draw @ numerators) / weight
        return values


def interval(
    values: NDArray[np.float64], *, coverage: float = COVERAGE
) -> tuple[float, float] | None:
    """The percentile interval of replicates.

    Args:
        values: [K]; NaN = not defined in that replicate.
        coverage: In ``(0, 1)``.

    Returns:
        (low, high), or None where no replicate is defined.
    """
    defined = values[~np.isnan(values)]
    if not len(defined):
        return None
    tail = (1 - coverage) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)
