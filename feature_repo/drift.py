"""How far features have moved from those that a model was trained on.

A reference, stored with the model, holds for every feature how many training rows fell into each
bin. The same bins are filled with the rows of a later window, and the two are compared by the
population stability index, ``PSI = sum((p - q) ln(p / q))`` over the bins, a missing value being a
bin of its own. By the usual reading below 0.1 is none, above 0.2 is drift.

Equal distributions have a PSI above 0, too: ``PSI / (1/n + 1/m)`` of n and m independent rows is
about chi-square with (bins - 1) degrees of freedom, where rows of one context count as one. Only
what exceeds both the threshold and what chance would give is called drift, so a small window raises
no alarm by its size alone.

Means of vectors are compared by cosine. Memory is that of the bins, whatever the number of rows.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AwareDatetime, model_validator

from feature_repo.manifest import Document

NUM_BINS = 10
"""Deciles of the training rows, as usual for the PSI."""
_CHANCE = 1e-3
"""That chance alone is called drift, for all features of a comparison together."""


class Distribution(Document):
    """How many rows fell into each bin of one feature."""

    edges: tuple[float, ...] = ()
    """Ascending. Bin i holds the values in ``(edges[i - 1], edges[i]]``; of a categorical feature
    there are none, and bin i holds the value of index i."""
    counts: tuple[int, ...]
    """Rows per bin, the missing ones last."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.edges and len(self.counts) != len(self.edges) + 2:
            raise ValueError(f"{len(self.edges)} edges need {len(self.edges) + 2} counts")
        return self

    @classmethod
    def of_edges(cls, edges: Sequence[float]) -> Self:
        """An empty one of a numeric feature."""
        return cls(edges=tuple(edges), counts=(0,) * (len(edges) + 2))

    @classmethod
    def of_categories(cls, num_values: int) -> Self:
        """An empty one of a categorical feature with indices ``0..num_values``, 0 being unknown."""
        return cls(counts=(0,) * (num_values + 2))

    @property
    def num_rows(self) -> int:
        """All of them."""
        return sum(self.counts)

    @property
    def missing_rate(self) -> float | None:
        """Share of the rows without a value; None where there are no rows."""
        return self.counts[-1] / self.num_rows if self.num_rows else None

    def empty(self) -> Self:
        """The same bins without rows."""
        return self.model_copy(update={"counts": (0,) * len(self.counts)})

    def plus(self, values: NDArray[np.floating] | NDArray[np.integer]) -> Self:
        """The same with more rows.

        Args:
            values: [R]; NaN where missing.
        """
        there = values[~np.isnan(values)]
        places = np.searchsorted(self.edges, there) if self.edges else there.astype(np.int64)
        last = len(self.counts) - 1
        found = np.bincount(np.minimum(places, last - 1), minlength=last)
        counts = [*found.tolist(), len(values) - len(there)]
        sums = tuple(old + new for old, new in zip(self.counts, counts, strict=True))
        return self.model_copy(update={"counts": sums})


def quantile_edges(values: NDArray[np.floating], num_bins: int = NUM_BINS) -> tuple[float, ...]:
    """Edges of bins of about equal mass; a value that fills a bin by itself has one of its own.

    Args:
        values: [R]; NaN where missing.
        num_bins: Bins where no value repeats.
    """
    there = values[~np.isnan(values)].astype(np.float64)
    if not len(there):
        return (0.0,)
    shares = np.arange(1, num_bins) / num_bins
    # Quantiles that occur: bins are closed above.
    quantiles = np.quantile(there, shares, method="inverted_cdf")
    edges, times = np.unique(quantiles, return_counts=True)
    below = np.nextafter(edges[times > 1], -np.inf)
    return tuple(np.unique([*edges, *below]).tolist())


def psi(first: Sequence[int], second: Sequence[int]) -> float:
    """Population stability index of two counts of the same bins; 0 where they are alike.

    Both are drawn a little towards what they are together, by half a row per bin: an empty bin
    would make the index infinite, and in few rows a bin is empty by chance.
    """
    a, b = np.array(first, dtype=np.float64), np.array(second, dtype=np.float64)
    filled = (a + b) > 0
    a, b = a[filled], b[filled]
    together, weight = (a + b) / (a + b).sum(), len(a) / 2
    p, q = ((counts + weight * together) / (counts.sum() + weight) for counts in (a, b))
    return float(((p - q) * np.log(p / q)).sum())


def psi_by_chance(num_bins: int, before: int, now: int, *, num_features: int) -> float:
    """The PSI that equal distributions exceed in one of 1000 comparisons of so many features.

    Args:
        num_bins: Bins with rows.
        before: Independent rows on one side.
        now: The same on the other.
        num_features: Features that are compared together.
    """
    from scipy.stats import chi2  # its import takes half a second

    if num_bins < 2 or not before or not now:
        return math.inf
    return float(chi2.isf(_CHANCE / num_features, num_bins - 1)) * (1 / before + 1 / now)


class Reference(Document):
    """What a model's training rows looked like: ``reference.json`` in its artifact."""

    start: AwareDatetime
    """Of the oldest row."""
    end: AwareDatetime
    """Of the newest row."""
    num_rows: int
    num_contexts: int
    """A user at one time; features of users and their histories count once per context."""
    distributions: dict[str, dict[str, Distribution]]
    """Group (``user``, ``item``, a scene, ...) -> feature -> its distribution."""
    mean_vectors: dict[str, tuple[float, ...]]
    """Kind of text -> mean of the vectors that were read."""


@dataclass(frozen=True)
class FeatureDrift:
    """One feature in two sets of rows.

    Args:
        psi: Of the training rows against the window's.
        by_chance: What the PSI of equal distributions would hardly exceed, rows of one context
            counting as one; None where a side has no rows.
        missing_before: Share of the training rows without a value.
        missing_now: The same of the window; None where it has no rows.
        drifted: Both the threshold and chance are exceeded.
        view: The feature view that it is of; None where it is made in the request.
    """

    psi: float
    by_chance: float | None
    missing_before: float | None
    missing_now: float | None
    drifted: bool
    view: str | None = None


@dataclass(frozen=True)
class Drift:
    """A window against the training rows.

    Args:
        features: Group -> feature -> how it moved.
        vectors: Kind of text -> cosine distance of the mean vectors, 0 to 2; None where nothing was
            read.
        drifted: What moved past the threshold, ``group.feature``, the farthest first.
    """

    features: dict[str, dict[str, FeatureDrift]]
    vectors: dict[str, float | None]
    drifted: tuple[str, ...]


def compare(
    reference: Reference,
    window: Reference,
    *,
    threshold: float,
    views: Mapping[str, Mapping[str, str]] | None = None,
) -> Drift:
    """Hold a window against a reference with the same bins.

    Args:
        reference: Of the training rows.
        window: Of later rows.
        threshold: Of the PSI and of the cosine distance, above 0.
        views: Group -> feature -> the feature view that it is of, where it is of one.
    """
    num_features = sum(len(of_group) for of_group in reference.distributions.values())
    sizes = reference.num_contexts, window.num_contexts
    features = {
        group: {
            name: _feature_drift(
                before,
                window.distributions[group][name],
                threshold=threshold,
                sizes=sizes,
                num_features=num_features,
                view=(views or {}).get(group, {}).get(name),
            )
            for name, before in of_group.items()
        }
        for group, of_group in reference.distributions.items()
    }
    vectors = {
        kind: cosine_distance(before, window.mean_vectors.get(kind, ()))
        for kind, before in reference.mean_vectors.items()
    }
    far = {
        f"{group}.{name}": found.psi
        for group, of_group in features.items()
        for name, found in of_group.items()
        if found.drifted
    }
    far |= {f"vectors.{k}": d for k, d in vectors.items() if d is not None and d > threshold}
    return Drift(features, vectors, tuple(sorted(far, key=lambda name: -far[name])))


def _feature_drift(
    before: Distribution,
    now: Distribution,
    *,
    threshold: float,
    sizes: tuple[int, int],
    num_features: int,
    view: str | None,
) -> FeatureDrift:
    both = before.num_rows and now.num_rows
    value = psi(before.counts, now.counts) if both else 0.0
    num_bins = sum(a + b > 0 for a, b in zip(before.counts, now.counts, strict=True))
    # Rows of one context share a user and a moment: they are not independent.
    chance = psi_by_chance(
        num_bins,
        min(sizes[0], before.num_rows),
        min(sizes[1], now.num_rows),
        num_features=num_features,
    )
    return FeatureDrift(
        psi=value,
        by_chance=None if math.isinf(chance) else chance,
        missing_before=before.missing_rate,
        missing_now=now.missing_rate,
        drifted=value > threshold and value > chance,
        view=view,
    )


def cosine_distance(first: Sequence[float], second: Sequence[float]) -> float | None:
    """1 - cosine of two vectors; None where one of them is empty or all zero."""
    a, b = np.array(first), np.array(second)
    if a.shape != b.shape or not a.any() or not b.any():
        return None
    return float(1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


class Collector:
    """Fills bins, chunk of rows by chunk.

    Args:
        bins: Group -> feature -> its distribution; the rows in it are not counted.
    """

    def __init__(self, bins: Mapping[str, Mapping[str, Distribution]]) -> None:
        self.distributions = {
            group: {name: found.empty() for name, found in of_group.items()}
            for group, of_group in bins.items()
        }
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._nums: dict[str, int] = {}

    def add(self, group: str, columns: Iterable[tuple[str, NDArray[np.floating]]]) -> None:
        """Count rows of some features of a group: name and values [R], NaN where missing."""
        of_group = self.distributions[group]
        for name, values in columns:
            of_group[name] = of_group[name].plus(values)

    def add_vectors(self, kind: str, total: NDArray[np.float64], num: int) -> None:
        """Count ``num`` vectors whose sum is ``total``, float64 [D]."""
        self._sums[kind] = self._sums.get(kind, np.zeros_like(total)) + total
        self._nums[kind] = self._nums.get(kind, 0) + num

    @property
    def mean_vectors(self) -> dict[str, tuple[float, ...]]:
        """Kind -> mean; empty where there were no vectors."""
        return {
            kind: tuple((total / self._nums[kind]).tolist()) if self._nums[kind] else ()
            for kind, total in self._sums.items()
        }
