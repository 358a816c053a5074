"""What a candidate has to do with one user's history, as numbers.

Computed from what the reader returned, by this one function, for training and serving alike; so the
whole kept history counts here, while the model itself reads only the newest behaviours of it.

Three kinds of evidence, told by the first part of the name:

- ``same_<scene>_*``: the candidate itself in the scene. NaN where it is not in it.
- ``near_<basket|user>_*``: the candidate's neighbours (:mod:`feature_repo.item_neighbors`) that the
  user has met in any scene, by weight; each item counts once, at its newest age.
- ``text_<scene>_*``: cosines of the candidate's text with the newest texts of the scene, behaviours
  about the candidate itself left out. NaN where there is none.

Shapes: S = scenes, N = behaviours kept per scene, C = candidates, K = neighbours, E = values.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from encoders.inputs import ItemInputs, UserInputs
from encoders.table import EmbeddingTable

KINDS = ("same", "near", "text")
SAME = ("count", "last_days", "previous_days", "first_days", "basket_share", "baskets_since")
NEAR_WEIGHTS = ("basket", "user")
NEAR = ("sum", "max", "recent_sum", "recent_max", "newest_sum")
TEXT = ("max", "mean", "recent_max")
TEXT_LENGTH = 50
"""Newest behaviours of a scene whose texts are compared."""
RECENT_DAYS = 90.0
"""Decay of the ``recent`` values: ``exp(-age / RECENT_DAYS)``."""
NEWEST_DAYS = 15.0
_DAY_S = 86_400.0


def evidence_names(scenes: Sequence[str]) -> tuple[str, ...]:
    """Names of the E values."""
    return (
        *(f"same_{scene}_{what}" for scene in scenes for what in SAME),
        *(f"near_{weight}_{what}" for weight in NEAR_WEIGHTS for what in NEAR),
        *(f"text_{scene}_{what}" for scene in scenes for what in TEXT),
    )


def candidate_evidence(
    user: UserInputs, row: int, items: ItemInputs, table: EmbeddingTable
) -> NDArray[np.float32]:
    """The evidence of candidates for one user.

    Cost: two sorts of the history, then ``C (S + K) log N``.

    Args:
        user: Users with their whole kept histories.
        row: Which of them.
        items: The C candidates.
        table: Vectors of the texts.

    Returns:
        float32 [C, E], in the order of :func:`evidence_names`; NaN = nothing to say.
    """
    keys, ages = user.history_item_keys[row], user.history_ages[row]
    parts = [
        _same(keys[scene], ages[scene], items.candidate_item_keys) for scene in range(len(keys))
    ]
    parts.append(_near(keys, ages, items))
    titles = _directions(table, items.candidate_rows)
    rows = user.history_rows[row]
    for scene in range(len(keys)):
        newest = slice(-TEXT_LENGTH, None)
        parts.append(
            _text(
                _directions(table, rows[scene, newest]),
                rows[scene, newest] != 0,
                keys[scene, newest],
                ages[scene, newest],
                titles,
                items,
            )
        )
    return np.concatenate(parts, axis=1, dtype=np.float32)


def _same(
    keys: NDArray[np.int64], ages: NDArray[np.float32], candidates: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Count, ages of newest, second newest and oldest in days, and how regular.

    ``basket_share`` is the count over the user's distinct moments since the oldest, that included;
    ``baskets_since`` the moments after the newest.
    """
    result = np.full((len(candidates), len(SAME)), np.nan, dtype=np.float32)
    there = keys != 0
    keys, ages = keys[there], ages[there]
    if not len(keys):
        return result
    order = np.argsort(keys, kind="stable")  # of one key the oldest first
    ordered = keys[order]
    low = np.searchsorted(ordered, candidates)
    high = np.searchsorted(ordered, candidates, side="right")
    has = high > low
    low, high = low[has], high[has]
    newest, oldest = order[high - 1], order[low]
    count = high - low
    previous = np.where(count > 1, ages[order[np.maximum(high - 2, 0)]], np.nan)
    basket = np.cumsum(np.r_[True, ages[1:] != ages[:-1]])
    result[has] = np.stack(
        [
            count,
            ages[newest] / _DAY_S,
            previous / _DAY_S,
            ages[oldest] / _DAY_S,
            count / (basket[-1] - basket[oldest] + 1),
            basket[-1] - basket[newest],
        ],
        axis=1,
    )
    return result


def _near(
    keys: NDArray[np.int64], ages: NDArray[np.float32], items: ItemInputs
) -> NDArray[np.float32]:
    """Sums and largest of the weights of met neighbours, plain and decayed with their age."""
    num = len(items.candidate_item_keys)
    there = keys != 0
    met, met_ages = keys[there], ages[there]
    if not len(met) or not items.neighbor_keys.shape[1]:
        return np.zeros((num, len(NEAR_WEIGHTS) * len(NEAR)), dtype=np.float32)
    order = np.lexsort((met_ages, met))
    met, first = np.unique(met[order], return_index=True)
    days = met_ages[order][first] / np.float32(_DAY_S)
    place = np.minimum(np.searchsorted(met, items.neighbor_keys), len(met) - 1)
    found = (met[place] == items.neighbor_keys) & (items.neighbor_keys != 0)
    weights = np.where(found[..., None], items.neighbor_weights, np.float32(0))  # (C, K, 2)
    recent = weights * np.exp(-days / np.float32(RECENT_DAYS))[place][..., None]
    newest = weights * np.exp(-days / np.float32(NEWEST_DAYS))[place][..., None]
    values = np.stack(
        [weights.sum(1), weights.max(1), recent.sum(1), recent.max(1), newest.sum(1)], axis=-1
    )
    return values.reshape(num, -1)  # (C, 2, 5) -> (C, 10)


def _text(
    history: NDArray[np.float32],
    there: NDArray[np.bool_],
    keys: NDArray[np.int64],
    ages: NDArray[np.float32],
    titles: NDArray[np.float32],
    items: ItemInputs,
) -> NDArray[np.float32]:
    """Largest and mean cosine, and the largest one decayed with its behaviour's age."""
    result = np.full((len(titles), len(TEXT)), np.nan, dtype=np.float32)
    if not there.any():
        return result
    same = (items.candidate_item_keys[:, None] == keys) & (keys != 0)
    kept = there & ~same & (items.candidate_rows != 0)[:, None]
    some = kept.any(axis=1)
    cosines = titles @ history.T
    decayed = cosines * np.exp(-ages / np.float32(RECENT_DAYS * _DAY_S))
    result[some] = np.stack(
        [
            np.where(kept, cosines, -1).max(axis=1),
            (cosines * kept).sum(axis=1) / np.maximum(kept.sum(axis=1), 1),
            np.where(kept, decayed, -1).max(axis=1),
        ],
        axis=1,
    )[some]
    return result


def _directions(table: EmbeddingTable, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Unit vectors of table rows; zero for row 0."""
    vectors = np.asarray(table.vectors[rows], dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    directions: NDArray[np.float32] = np.divide(
        vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0
    )
    return directions
