"""Impressions to model inputs: features through the one reader, arrays that stay in memory.

Shapes: N = contexts (a user at one time), R = impressions, S = scenes, M = behaviours per scene.

A context's user side is read once, however many impressions it has. Reading goes in chunks of
contexts: the whole kept histories and the neighbours of a chunk become evidence, then only the last
M behaviours are kept. Memory beyond the arrays kept (about 20 bytes x S x M per context) does not
grow with the data.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from encoders.evidence import candidate_evidence, evidence_names
from encoders.inputs import ItemInputs, UserInputs, item_inputs, user_inputs
from encoders.table import EmbeddingTable
from feature_repo.features import Reader
from feature_repo.progress import Progress, silent
from training.impressions import Impressions
from training.schema import select_columns

CHUNK_BEHAVIORS = 20_000_000
"""Places for behaviours read at a time: half a gigabyte, 5,000 contexts at S = 2, N = 2000."""
CHUNK_CONTEXTS = 20_000
"""Most contexts read at a time."""
MAX_CATEGORY_VALUES = 1000
"""Values of a column that get an index, the most frequent ones of the training rows."""
MIN_CATEGORY_COUNT = 10
"""Training rows that a value needs to get an index."""


@dataclass(frozen=True)
class ClickData:
    """Impressions as inputs of a model, grouped by context.

    Args:
        users: Arrays [N, ...].
        items: Arrays [R, ...].
        context: float32 [R, Fx].
        evidence: float32 [R, E].
        clicked: int64 [R].
        offsets: int64 [N + 1]; context n has the rows ``offsets[n]:offsets[n + 1]``.
        impressions: The same R rows, in the same order.
        user_dense_names: Of ``users.user_dense``.
        item_dense_names: Of ``items.candidate_dense``.
        category_vocabularies: Of ``items.candidate_categories``.
        evidence_names: Of ``evidence``.
    """

    users: UserInputs
    items: ItemInputs
    context: NDArray[np.float32]
    evidence: NDArray[np.float32]
    clicked: NDArray[np.int64]
    offsets: NDArray[np.int64]
    impressions: Impressions
    user_dense_names: tuple[str, ...]
    item_dense_names: tuple[str, ...]
    category_vocabularies: dict[str, tuple[str, ...]]
    evidence_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.clicked)

    @property
    def num_contexts(self) -> int:
        """N."""
        return len(self.offsets) - 1

    def last(self, sequence_length: int) -> "ClickData":
        """The same with at most the newest ``sequence_length`` behaviours per scene; no copy."""
        return replace(self, users=self.users.last(sequence_length))

    def where(self, keep: NDArray[np.bool_]) -> "ClickData":
        """The rows [R] to keep, with the contexts that still have one; copies."""
        rows = np.flatnonzero(keep)
        sizes = np.diff(np.append(0, np.cumsum(keep))[self.offsets])
        contexts = np.flatnonzero(sizes)
        return replace(
            self,
            users=self.users.take(contexts),
            items=self.items.take(rows),
            context=self.context[rows],
            evidence=self.evidence[rows],
            clicked=self.clicked[rows],
            offsets=np.append(0, np.cumsum(sizes[contexts])),
            impressions=self.impressions.take(rows),
        )

    def sample(self, share: float, *, seed: int) -> "ClickData":
        """A share of the contexts, at least one, with all rows of each; copies."""
        number = max(1, round(share * self.num_contexts))
        drawn = np.random.default_rng(seed).permutation(self.num_contexts)[:number]
        chosen = np.isin(np.arange(self.num_contexts), drawn)
        return self.where(np.repeat(chosen, np.diff(self.offsets)))

    @cached_property
    def history_lengths(self) -> NDArray[np.int64]:
        """int64 [N]: positions from the newest to the oldest behaviour of the longest scene."""
        there = (self.users.history_rows != 0) | (self.users.history_item_keys != 0)
        length = there.shape[-1]
        lengths: NDArray[np.int64] = np.where(there.any(-1), length - there.argmax(-1), 0)
        return np.asarray(lengths.max(axis=1), dtype=np.int64)

    @cached_property
    def user_codes(self) -> NDArray[np.int64]:
        """int64 [R]: a number for every distinct user."""
        return np.unique(self.impressions.user_ids.astype(str), return_inverse=True)[1]


def read_clicks(
    impressions: Impressions,
    reader: Reader,
    table: EmbeddingTable,
    *,
    scenes: Sequence[str],
    sequence_length: int,
    vocabularies: Mapping[str, Sequence[str]] | None = None,
    user_dense_names: Sequence[str] | None = None,
    item_dense_names: Sequence[str] | None = None,
    progress: Progress = silent,
) -> ClickData:
    """Read the features of all impressions.

    Args:
        impressions: Rows in any order.
        reader: Where features come from.
        table: Vectors of the texts.
        scenes: In the order that the model reads.
        sequence_length: M.
        vocabularies: Values of the categorical columns; None = taken from these rows.
        user_dense_names: Columns in this order; None = as the reader has them.
        item_dense_names: Columns in this order; None = as the reader has them.
        progress: Told the impressions read.

    Raises:
        ArtifactError: If the reader lacks a wanted column.
    """
    impressions, starts = _group(impressions)
    offsets = np.append(starts, len(impressions))
    users: list[UserInputs] = []
    items: list[ItemInputs] = []
    evidence: list[NDArray[np.float32]] = []
    counter = None if vocabularies is not None else _VocabularyCounter()
    size = max(1, min(CHUNK_CONTEXTS, CHUNK_BEHAVIORS // (len(scenes) * reader.sequence_length)))
    for first in range(0, len(starts), size):
        bounds = offsets[first : first + size + 1]
        requests = impressions.take(starts[first : first + size])
        user_features = reader.historical_users(requests.user_ids, requests.times)
        names = user_dense_names = tuple(user_dense_names or user_features.dense_names)
        inputs = user_inputs(user_features, table, scenes=scenes)
        dense = select_columns(inputs.user_dense, user_features.dense_names, names, what="user")
        inputs = replace(inputs, user_dense=dense)
        rows = impressions.take(np.arange(bounds[0], bounds[-1]))
        item_features = reader.historical_items(rows.item_ids, rows.times)
        names = item_dense_names = tuple(item_dense_names or item_features.dense_names)
        known = vocabularies if counter is None else counter.extend(item_features.categorical)
        assert known is not None
        chunk = item_inputs(item_features, table, vocabularies=known)
        dense = select_columns(chunk.candidate_dense, item_features.dense_names, names, what="item")
        chunk = replace(chunk, candidate_dense=dense)
        for context, (start, end) in enumerate(pairwise(bounds - bounds[0])):
            candidates = chunk.take(slice(start, end))
            evidence.append(candidate_evidence(inputs, context, candidates, table))
            progress(int(end - start), len(impressions))
        users.append(_copied(inputs.last(sequence_length)))
        items.append(chunk.without_neighbors())
    joined = _concatenate(items, ItemInputs)
    final = {name: tuple(values) for name, values in (vocabularies or {}).items()}
    if counter is not None:
        final, codes = counter.finish(joined.candidate_categories)
        joined = replace(joined, candidate_categories=codes)
    return ClickData(
        users=_concatenate(users, UserInputs),
        items=joined,
        context=impressions.context,
        evidence=np.concatenate(evidence),
        clicked=impressions.clicked,
        offsets=offsets,
        impressions=impressions,
        user_dense_names=tuple(user_dense_names or ()),
        item_dense_names=tuple(item_dense_names or ()),
        category_vocabularies=final,
        evidence_names=evidence_names(scenes),
    )


def _group(impressions: Impressions) -> tuple[Impressions, NDArray[np.int64]]:
    """Rows sorted by context, otherwise as they were, and where each context starts."""
    users = np.unique(impressions.user_ids.astype(str), return_inverse=True)[1]
    order = np.lexsort((users, impressions.times))  # stable
    users, times = users[order], impressions.times[order]
    new = np.r_[True, (users[1:] != users[:-1]) | (times[1:] != times[:-1])]
    return impressions.take(order), np.flatnonzero(new)


_Inputs = TypeVar("_Inputs", UserInputs, ItemInputs)


def _copied(inputs: UserInputs) -> UserInputs:
    """The same in arrays of their own: a view of the newest would keep all behaviours alive."""
    return UserInputs(**{f.name: getattr(inputs, f.name).copy() for f in fields(inputs)})


def _concatenate(parts: Sequence[_Inputs], kind: Callable[..., _Inputs]) -> _Inputs:
    names = [field.name for field in fields(parts[0])]
    return kind(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in names})


class _VocabularyCounter:
    """Vocabularies that grow while chunks are read and are cut to the frequent values then."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, None]] = {}

    def extend(self, columns: Mapping[str, NDArray[np.object_]]) -> dict[str, list[str]]:
        """Add the values of one more chunk; the values before keep their places."""
        for name in columns:
            seen = self._values.setdefault(name, {})
            seen.update(dict.fromkeys(v for v in columns[name] if v is not None))
        return {name: list(seen) for name, seen in self._values.items()}

    def finish(
        self, codes: NDArray[np.int64]
    ) -> tuple[dict[str, tuple[str, ...]], NDArray[np.int64]]:
        """The frequent values, by falling frequency, and the codes [R, K] in those."""
        result = np.zeros_like(codes)
        vocabularies = {}
        for column, (name, seen) in enumerate(self._values.items()):
            values = list(seen)
            counts = np.bincount(codes[:, column], minlength=len(values) + 1)[1:]
            frequent = [i for i in range(len(values)) if counts[i] >= MIN_CATEGORY_COUNT]
            frequent.sort(key=lambda i: (-int(counts[i]), values[i]))
            frequent = frequent[:MAX_CATEGORY_VALUES]
            new_codes = np.zeros(len(values) + 1, dtype=np.int64)
            for place, index in enumerate(frequent):
                new_codes[index + 1] = place + 1
            result[:, column] = new_codes[codes[:, column]]
            vocabularies[name] = tuple(values[i] for i in frequent)
        return vocabularies, result
