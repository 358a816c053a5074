"""What a candidate has to do with one user's history, as numbers.

Computed from what the reader returned, by this one function, for training and serving alike; so the
whole kept history counts here, while the model itself reads only the newest behaviours of it.

Three kinds of evidence, told by the first part of the name:

- ``same_<scene>_*``: the candidate itself in the scene. NaN where it is not in it.
- ``near_<basket|user>_*``: the candidate's neighbours (:mod:`feature_repo.item_neighbors`) that the
  user has met in any scene, by weight; each item counts once, at its newest age.
- ``text_<scene>_*``: cosines of the candidate's text with the newest texts of the scene, behaviours
  about the candidate itself left out. NaN where there is none.

Shapes: S = scenes, N = behaviours kept per scene, C = candidates, K = neighbours, E = values,
H = behaviours of all scenes that name an item, G = distinct items among them, L = behaviours of a
scene whose texts are compared.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

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
_FILTER_BITS = 14
"""A thousand items leave 1 of 16 keys that are not among them to be searched for."""


def evidence_names(scenes: Sequence[str]) -> tuple[str, ...]:
    """Names of the E values."""
    return (
        *(f"same_{scene}_{what}" for scene in scenes for what in SAME),
        *(f"near_{weight}_{what}" for weight in NEAR_WEIGHTS for what in NEAR),
        *(f"text_{scene}_{what}" for scene in scenes for what in TEXT),
    )


def candidate_evidence(
    user: UserInputs,
    row: int,
    items: ItemInputs,
    table: EmbeddingTable,
    kinds: Collection[str] | None = None,
) -> NDArray[np.float32]:
    """The evidence of candidates for one user.

    Cost: one sort of the history, then ``C (S + K) log N`` and ``C S L D``.

    Args:
        user: Users with their whole kept histories.
        row: Which of them.
        items: The C candidates.
        table: Vectors of the texts.
        kinds: Those that are wanted, of :data:`KINDS`; the others are NaN. None = all.

    Returns:
        float32 [C, E], in the order of :func:`evidence_names`; NaN = nothing to say.
    """
    keys, ages, rows = user.history_item_keys[row], user.history_ages[row], user.history_rows[row]
    num, num_scenes = len(items.candidate_item_keys), len(keys)
    met = _met_items(keys, ages)
    newest = slice(-TEXT_LENGTH, None)
    compute = {
        "same": lambda: _same(met, num_scenes, items.candidate_item_keys),
        "near": lambda: _near(met, items),
        "text": lambda: _text(rows[:, newest], keys[:, newest], ages[:, newest], items, table),
    }
    sizes = {
        "same": (num_scenes, len(SAME)),
        "near": (len(NEAR_WEIGHTS), len(NEAR)),
        "text": (num_scenes, len(TEXT)),
    }
    wanted = KINDS if kinds is None else kinds
    parts = [
        compute[kind]() if kind in wanted else np.full((num, *sizes[kind]), np.nan, np.float32)
        for kind in KINDS
    ]
    flat = [part.reshape(num, part.shape[1] * part.shape[2]) for part in parts]
    return np.concatenate(flat, axis=1)


@dataclass(frozen=True)
class _MetItems:
    """The items of a history: behaviours by item, of one item by scene, of those oldest first.

    Args:
        keys: int64 [G], ascending.
        starts: int64 [G, S]; where an item's behaviours in a scene begin.
        counts: int64 [G, S]; how many there are.
        ages: float32 [H].
        moments: int64 [H]; number of the behaviour's moment, ascending in each scene.
        last_moments: int64 [S]; of each scene's newest behaviour.
    """

    keys: NDArray[np.int64]
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]
    ages: NDArray[np.float32]
    moments: NDArray[np.int64]
    last_moments: NDArray[np.int64]


def _met_items(keys: NDArray[np.int64], ages: NDArray[np.float32]) -> _MetItems:
    num_scenes, num_kept = keys.shape
    there = (keys != 0).reshape(-1).nonzero()[0]
    scenes = there // num_kept
    keys, ages = keys.reshape(-1)[there], ages.reshape(-1)[there]
    # Where a scene begins does not matter: only moments of one scene are compared.
    moments = np.zeros(len(ages), dtype=np.int64)
    np.cumsum(ages[1:] != ages[:-1], out=moments[1:])
    ends = scenes.searchsorted(np.arange(1, num_scenes + 1))
    order = keys.argsort(kind="stable")
    keys = keys[order]
    new = np.ones(len(keys), dtype=bool)
    np.not_equal(keys[1:], keys[:-1], out=new[1:])
    first = new.nonzero()[0]
    cells = (new.cumsum() - 1) * num_scenes + scenes[order]
    counts = np.bincount(cells, minlength=len(first) * num_scenes)
    return _MetItems(
        keys=keys[first],
        starts=(counts.cumsum() - counts).reshape(-1, num_scenes),
        counts=counts.reshape(-1, num_scenes),
        ages=ages[order],
        moments=moments[order],
        last_moments=moments[np.maximum(ends - 1, 0)] if len(moments) else ends,
    )


def _same(met: _MetItems, num_scenes: int, candidates: NDArray[np.int64]) -> NDArray[np.float32]:
    """Count, ages of newest, second newest and oldest in days, and how regular, [C, S, 6].

    ``basket_share`` is the count over the user's distinct moments since the oldest, that included;
    ``baskets_since`` the moments after the newest.
    """
    result = np.full((len(candidates), num_scenes, len(SAME)), np.nan, dtype=np.float32)
    if not len(met.keys):
        return result
    place = np.minimum(met.keys.searchsorted(candidates), len(met.keys) - 1)
    counts = np.where((met.keys[place] == candidates)[:, None], met.counts[place], 0)
    which, scenes = counts.nonzero()
    count = counts[which, scenes]
    oldest = met.starts[place[which], scenes]
    newest = oldest + count - 1
    last = met.last_moments[scenes]
    days = met.ages / _DAY_S
    values = np.empty((len(SAME), len(count)))
    values[0] = count
    values[1] = days[newest]
    values[2] = np.where(count > 1, days[np.maximum(newest - 1, 0)], np.nan)
    values[3] = days[oldest]
    values[4] = count / (last - met.moments[oldest] + 1)
    values[5] = last - met.moments[newest]
    result[which, scenes] = values.T
    return result


def _near(met: _MetItems, items: ItemInputs) -> NDArray[np.float32]:
    """Sums and largest of the weights of met neighbours, plain and decayed, [C, 2, 5]."""
    num, num_neighbors = items.neighbor_keys.shape
    result = np.zeros((num, len(NEAR_WEIGHTS), len(NEAR)), dtype=np.float32)
    if not len(met.keys) or not num_neighbors:
        return result
    candidates, neighbors, place = _places(met.keys, items.neighbor_keys)
    firsts = met.starts[:, 0]  # an item's behaviours begin with its first scene's
    days = np.minimum.reduceat(met.ages, firsts) / np.float32(_DAY_S)
    decays = np.ones((len(days), 3), dtype=np.float32)
    decays[:, 1] = np.exp(-days / np.float32(RECENT_DAYS))
    decays[:, 2] = np.exp(-days / np.float32(NEWEST_DAYS))
    found = items.neighbor_weights[candidates, neighbors]
    values = found[:, :, None] * decays[place][:, None]  # (found, 2, 3), by candidate
    first = np.flatnonzero(np.diff(candidates, prepend=-1))
    if len(first):
        result[candidates[first], :, 0::2] = np.add.reduceat(values, first)
        result[candidates[first], :, 1::2] = np.maximum.reduceat(values[..., :2], first)
    return result


def _places(
    keys: NDArray[np.int64], wanted: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of each wanted key [C, K] that is among ascending ``keys``, and where."""
    # Keys are hashes: their last bits alone tell most that are not there from all that are.
    last_bits = np.zeros(1 << _FILTER_BITS, dtype=bool)
    last_bits[keys & (len(last_bits) - 1)] = True
    num_columns = wanted.shape[1]
    wanted = wanted.reshape(-1)
    maybe = last_bits[wanted & (len(last_bits) - 1)].nonzero()[0]
    place = np.minimum(keys.searchsorted(wanted[maybe]), len(keys) - 1)
    there = keys[place] == wanted[maybe]
    rows, columns = np.divmod(maybe[there], num_columns)
    return rows, columns, place[there]


def _text(
    rows: NDArray[np.int64],
    keys: NDArray[np.int64],
    ages: NDArray[np.float32],
    items: ItemInputs,
    table: EmbeddingTable,
) -> NDArray[np.float32]:
    """Largest and mean cosine, and the largest one decayed with its behaviour's age, [C, S, 3]."""
    candidates, candidate_rows = items.candidate_item_keys, items.candidate_rows
    result = np.full((len(candidates), len(rows), len(TEXT)), np.nan, dtype=np.float32)
    scenes, positions = rows.nonzero()
    if not len(scenes):
        return result
    keys, ages = keys[scenes, positions], ages[scenes, positions]
    decays = np.exp(-ages / np.float32(RECENT_DAYS * _DAY_S))
    cosines = table.cosines(candidate_rows, rows[scenes, positions])  # (C, those that are there)
    left_out = (candidates[:, None] == keys) & (keys != 0)
    ends = scenes.searchsorted(np.arange(len(rows) + 1))
    for scene, (start, end) in enumerate(pairwise(ends)):
        if start == end:
            continue
        its, out = cosines[:, start:end], left_out[:, start:end]
        number = (end - start) - out.sum(axis=1)
        its[out] = 0
        mean = its.sum(axis=1) / np.maximum(number, 1)
        decayed = its * decays[start:end]
        its[out] = decayed[out] = -1
        values = np.stack([its.max(axis=1), mean, decayed.max(axis=1)], axis=1)
        values[(number == 0) | (candidate_rows == 0)] = np.nan
        result[:, scene] = values
    return result
