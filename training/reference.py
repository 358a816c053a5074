"""How the rows that a model reads are distributed: its training rows, or those of a later window.

Both are counted by the same code, from the arrays that the model itself reads. Groups: ``user``,
``item``, ``context`` and ``evidence`` hold the model's numbers by their names, ``category`` the
columns of items, ``history`` per scene how many behaviours there are and how old they are, and
``text`` how long the vectors are.

Shapes: N = contexts (a user at one time), R = impressions, S = scenes, M = behaviours per scene,
V = rows of the table.
"""

from collections.abc import Mapping
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from encoders.table import EmbeddingTable
from feature_repo.drift import Collector, Distribution, Reference, quantile_edges
from feature_repo.errors import DataSetError
from training.dataset import ClickData

Values = dict[str, dict[str, NDArray[np.float32]]]
"""Group -> feature -> values, [N] or [R], NaN where missing."""

_SAMPLE_ROWS = 100_000
"""Rows from which the edges of the bins are taken: a decile is then right to 0.1 % of the rows."""
_CHUNK_CONTEXTS = 10_000
_VECTORS_AT_ONCE = 50_000
_DAY_S = 86_400.0
_NORM_DIGITS = 4
"""Unit vectors differ in the seventh digit, which would make bins of its own."""
HISTORY, CANDIDATES = "history", "candidates"
"""Kinds of texts of which mean vectors are kept."""


class RowCounter:
    """Counts chunks of rows into the bins of a reference.

    Args:
        bins: Group -> feature -> its distribution; the rows in it are not counted.
        table: Vectors of the encoder that the model reads.
        scenes: S names, in the order of the arrays.
        norms: Of :func:`vector_norms`, where the caller has them; it reads the whole table.
    """

    def __init__(
        self,
        bins: Mapping[str, Mapping[str, Distribution]],
        table: EmbeddingTable,
        scenes: tuple[str, ...],
        *,
        norms: NDArray[np.float32] | None = None,
    ) -> None:
        self._collector = Collector(bins)
        self._table, self._scenes = table, scenes
        self._norms = vector_norms(table) if norms is None else norms
        self._texts = {kind: np.zeros(len(table), np.int64) for kind in (HISTORY, CANDIDATES)}
        self._first = self._last = 0
        self._num_rows = self._num_contexts = 0

    def add(self, data: ClickData) -> None:
        """Count the rows of a chunk."""
        times = data.impressions.times
        first, last = int(times.min()), int(times.max())
        self._first = min(self._first, first) if self._num_rows else first
        self._last = max(self._last, last)
        self._num_rows += len(data)
        self._num_contexts += data.num_contexts
        for start in range(0, data.num_contexts, _CHUNK_CONTEXTS):
            contexts = slice(start, start + _CHUNK_CONTEXTS)
            bounds = data.offsets[start : start + _CHUNK_CONTEXTS + 1]
            rows = slice(int(bounds[0]), int(bounds[-1]))
            for group, columns in feature_values(
                data, self._norms, self._scenes, contexts, rows
            ).items():
                self._collector.add(group, columns.items())
            for kind, places in (
                (HISTORY, data.users.history_rows[contexts]),
                (CANDIDATES, data.items.candidate_rows[rows]),
            ):
                self._texts[kind] += np.bincount(places.ravel(), minlength=len(self._table))

    def reference(self) -> Reference:
        """What was counted.

        Raises:
            DataSetError: If there was nothing.
        """
        if not self._num_rows:
            raise DataSetError("there are no impressions to count")
        for kind, counts in self._texts.items():
            self._add_vectors(kind, counts)
        start, end = (datetime.fromtimestamp(t / 1e6, UTC) for t in (self._first, self._last))
        return Reference(
            start=start,
            end=end,
            num_rows=self._num_rows,
            num_contexts=self._num_contexts,
            distributions=self._collector.distributions,
            mean_vectors=self._collector.mean_vectors,
        )

    def _add_vectors(self, kind: str, counts: NDArray[np.int64]) -> None:
        """Sum the vectors of the texts that were read, as often as they were."""
        read = np.flatnonzero(counts)
        read = read[read != 0]  # no text
        total = np.zeros(self._table.width)
        for start in range(0, len(read), _VECTORS_AT_ONCE):
            rows = read[start : start + _VECTORS_AT_ONCE]
            total += counts[rows] @ self._table.vectors[rows].astype(np.float64)
        self._collector.add_vectors(kind, total, int(counts[read].sum()))


def training_reference(
    data: ClickData, table: EmbeddingTable, scenes: tuple[str, ...]
) -> Reference:
    """The reference of a model's training rows; its bins are their deciles.

    Args:
        data: The training rows.
        table: The vectors that they were read with.
        scenes: S names, in the order of the arrays.
    """
    norms = vector_norms(table)
    sample = feature_values(
        data,
        norms,
        scenes,
        slice(None, None, -(-data.num_contexts // _SAMPLE_ROWS)),
        slice(None, None, -(-len(data) // _SAMPLE_ROWS)),
    )
    bins = {
        group: {
            name: Distribution.of_categories(len(data.category_vocabularies[name]))
            if group == "category"
            else Distribution.of_edges(quantile_edges(values))
            for name, values in columns.items()
        }
        for group, columns in sample.items()
    }
    counter = RowCounter(bins, table, scenes, norms=norms)
    counter.add(data)
    return counter.reference()


def feature_values(
    data: ClickData,
    norms: NDArray[np.float32],
    scenes: tuple[str, ...],
    contexts: slice,
    rows: slice,
) -> Values:
    """What the model reads of some contexts and some rows, by group and name.

    Args:
        data: The rows.
        norms: Of :func:`vector_norms`.
        scenes: S names.
        contexts: Which of the N.
        rows: Which of the R.
    """
    users, items = data.users, data.items
    there = users.history_rows[contexts] != 0  # (N, S, M)
    lengths = there.sum(axis=-1)
    ages = np.where(there, users.history_ages[contexts], 0)
    history: dict[str, NDArray[np.float32]] = {}
    text: dict[str, NDArray[np.float32]] = {}
    with np.errstate(invalid="ignore"):  # 0 / 0: no history
        mean_ages = ages.sum(axis=-1) / lengths / _DAY_S
        mean_norms = norms[users.history_rows[contexts]].sum(axis=-1) / lengths
    newest = np.where(there[..., -1], ages[..., -1], np.nan) / _DAY_S
    for place, scene in enumerate(scenes):
        history[f"{scene}_length"] = lengths[:, place].astype(np.float32)
        history[f"{scene}_total"] = users.history_totals[contexts, place]
        history[f"{scene}_newest_age_days"] = newest[:, place].astype(np.float32)
        history[f"{scene}_mean_age_days"] = mean_ages[:, place].astype(np.float32)
        text[f"{scene}_norm"] = _rounded(mean_norms[:, place])
    titles = items.candidate_rows[rows]
    text["title_norm"] = _rounded(np.where(titles != 0, norms[titles], np.nan))
    categories = items.candidate_categories[rows].astype(np.float32)
    return {
        "user": _named(data.user_dense_names, users.user_dense[contexts]),
        "item": _named(data.item_dense_names, items.candidate_dense[rows]),
        "category": _named(tuple(data.category_vocabularies), categories),
        "context": _named(data.impressions.context_names, data.context[rows]),
        "evidence": _named(data.evidence_names, data.evidence[rows]),
        "history": history,
        "text": text,
    }


def vector_norms(table: EmbeddingTable) -> NDArray[np.float32]:
    """Length of every vector of the table, float32 [V]; 0 for "no text"."""
    norms = np.empty(len(table), np.float32)
    for start in range(0, len(table), _VECTORS_AT_ONCE):
        rows = slice(start, start + _VECTORS_AT_ONCE)
        norms[rows] = np.linalg.norm(table.vectors[rows], axis=1)
    return norms


def _named(names: tuple[str, ...], values: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    return {name: values[:, column] for column, name in enumerate(names)}


def _rounded(values: NDArray[np.floating]) -> NDArray[np.float32]:
    return np.round(values, _NORM_DIGITS).astype(np.float32)
