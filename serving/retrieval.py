"""From the whole catalogue to the few hundred items that are worth a full score.

Exact: every item's vector is compared. Vectors say what is alike; what was bought before and what
sells now are evidence that they do not hold, so both are always among the candidates.

Shapes: R = items of the catalogue, S = scenes, Q = width of a deep output, T = items chosen.
"""

import numpy as np
from numpy.typing import NDArray

from serving.history import History
from serving.items import Catalogue

MAX_MET = 200
"""Newest distinct items of the history that are candidates."""
MAX_POPULAR = 100


def retrieve(
    catalogue: Catalogue, history: History, user_outputs: NDArray[np.float32] | None, number: int
) -> NDArray[np.intp]:
    """Rows of the catalogue to score, ascending.

    The items that the history names (:data:`MAX_MET`), the most popular (:data:`MAX_POPULAR`), and
    up to ``number`` in all those whose vectors have the largest products with the user's.

    Args:
        catalogue: All items.
        history: The user's.
        user_outputs: float32 [1, S, Q]; None where the model has none: then popularity decides.
        number: T at most; all items where there are no more.

    Cost: R Q multiplications and a partition of R numbers.
    """
    items = catalogue.items
    num_items = len(items.item_ids)
    if num_items <= number:
        return np.arange(num_items)
    met_keys = history.item_keys[history.item_keys != 0]
    _, newest = np.unique(met_keys, return_index=True)
    met = catalogue.rows_of_keys(met_keys[np.sort(newest)[:MAX_MET]])
    first = np.concatenate([met, catalogue.by_popularity[:MAX_POPULAR]])
    _, places = np.unique(first, return_index=True)
    chosen = first[np.sort(places)[:number]]
    if len(chosen) < number:
        if user_outputs is None or items.outputs is None:
            worth = items.recent_behaviors.copy()
        else:
            worth = items.outputs @ user_outputs[0].sum(axis=0)
        worth[chosen] = -np.inf
        rest = number - len(chosen)
        chosen = np.concatenate([chosen, np.argpartition(-worth, rest - 1)[:rest]])
    return np.sort(chosen)


def similar(
    catalogue: Catalogue, row: int, number: int
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """The items nearest to one, by the cosine of their directions; itself and its twins left out.

    Args:
        catalogue: All items.
        row: Of the item.
        number: At most.

    Returns:
        Rows and cosines, nearest first; of equal cosines the smaller item id first.
    """
    directions = catalogue.directions
    cosines = directions @ directions[row]
    cosines[row] = -np.inf
    cosines[~directions.any(axis=1)] = -np.inf  # no text: near to nothing
    order = np.argsort(-cosines, kind="stable")[:number]
    order = order[np.isfinite(cosines[order])]
    return order, cosines[order]
