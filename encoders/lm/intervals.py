"""How sure a figure is: what hangs together is drawn with replacement, all of it or nothing.

Shapes: N = rows, G = groups of rows that hang together.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

NUM_REPLICATES = 1000
COVERAGE = 0.95

Values = NDArray[np.floating[Any]] | NDArray[np.integer[Any]]
Interval = tuple[float, float]


def ratio_interval(
    numerators: Values, denominators: Values, *, groups: Sequence[Hashable] | None = None
) -> Interval | None:
    """The 95 % percentile interval of ``sum(numerators) / sum(denominators)``.

    The same rows get the same draws, so intervals of differences on the same rows are paired.

    Args:
        numerators: [N], any numbers.
        denominators: [N], above 0.
        groups: [N], which rows are drawn together; None = each row alone.

    Returns:
        (low, high), or None where there are less than two groups.

    Source:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13; groups: Field
        and Welsh, "Bootstrapping clustered data", JRSS B 2007.
    """
    rows = range(len(numerators)) if groups is None else groups
    number = {group: place for place, group in enumerate(dict.fromkeys(rows))}
    if len(number) < 2:
        return None
    codes = np.array([number[group] for group in rows], dtype=np.int64)
    tops = np.bincount(codes, weights=numerators)
    bottoms = np.bincount(codes, weights=denominators)
    found = bootstrap(
        (tops, bottoms),
        lambda top, bottom, axis: top.sum(axis=axis) / bottom.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=NUM_REPLICATES,
        confidence_level=COVERAGE,
        batch=100,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)
