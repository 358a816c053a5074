"""Why an item is where it is, in a few words: only what the features prove.

A reason is evidence from the user's own history, not an attribution of the model's score. In this
order: the item itself was in the history; its text is close to a behaviour's; it is among the most
popular; nothing of that.

Shapes: T = items to explain, L = newest behaviours that an item may be called like, D = width of a
vector.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serving.history import History

_UNITS = ((86_400, "day"), (3_600, "hour"), (60, "minute"))


def reasons(
    history: History,
    texts: Sequence[str],
    *,
    item_keys: NDArray[np.int64],
    item_vectors: NDArray[np.float32],
    history_vectors: NDArray[np.float32],
    popular: NDArray[np.bool_],
    min_similarity: float,
) -> list[str]:
    """One reason per item.

    Args:
        history: The user's behaviours, L or more.
        texts: Texts of the L newest.
        item_keys: int64 [T].
        item_vectors: float32 [T, D], unit length, all zero where the item has no text.
        history_vectors: float32 [L, D], unit length, all zero where the vector is not known.
        popular: bool [T]; True for the catalogue's most popular items.
        min_similarity: Least cosine at which two texts are called alike, in [-1, 1].

    Returns:
        T short texts such as ``purchase before: 3 times, last 12 days ago``.
    """
    cosines = item_vectors @ history_vectors.T  # [T, L]
    result = []
    for i, key in enumerate(item_keys):
        exact = _exact(history, int(key))
        if exact:
            result.append(exact)
            continue
        # argmax takes the first of equals, which is the newest.
        closest = int(cosines[i].argmax()) if len(texts) else -1
        if closest >= 0 and texts[closest] and cosines[i, closest] >= max(min_similarity, 1e-6):
            result.append(f"like '{texts[closest]}'")
        elif popular[i]:
            result.append("popular now")
        else:
            result.append("nothing alike in the history" if len(history) else "new user")
    return result


def _exact(history: History, key: int) -> str:
    """How often among the kept behaviours, and how long ago, the item itself was met, by scene."""
    met = history.item_keys == key if key else np.zeros(len(history), dtype=bool)
    parts = []
    for scene in dict.fromkeys(history.scenes[met]):
        times = history.timestamps[met & (history.scenes == scene)]
        count = "once," if len(times) == 1 else f"{len(times)} times, last"
        parts.append(f"{scene} before: {count} {ago(history.now - int(times[0]))}")
    return "; ".join(parts)


def ago(seconds: int) -> str:
    """Say an age in words: whole days, else hours, else minutes, rounded down."""
    for size, unit in _UNITS:
        if seconds >= size:
            count = seconds // size
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return "less than a minute ago"
