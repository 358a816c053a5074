"""A history that might have been: for "what if" questions; nothing is stored."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from feature_repo.behavior import behavior_id, item_key
from feature_repo.errors import LongtrailError
from feature_repo.features import SceneSequence, UserFeatures
from serving.answers import AddedBehavior, HistoryChanges
from serving.history import History


def change_history(
    users: UserFeatures,
    changes: HistoryChanges,
    *,
    title: Callable[[str], str | None],
    normalize: Callable[[str], str],
) -> UserFeatures:
    """The only user with a changed history; dense features stay as they were read.

    Args:
        users: As read.
        changes: What is left out and added.
        title: Item id -> its title, None for an unknown item.
        normalize: Makes a text one of the data's.

    Raises:
        LongtrailError: If a place or scene is not there, or an added behaviour has no text.
    """
    history = History.of(users)
    removed: dict[str, list[int]] = {}
    for place in changes.removed:
        if not 0 <= place < len(history):
            raise LongtrailError(
                f"changes remove behaviour {place}, but the history has {len(history)}, counted "
                "from 0"
            )
        removed.setdefault(str(history.scenes[place]), []).append(int(history.positions[place]))
    sequences = {
        scene: _without(sequence, removed.get(scene, []))
        for scene, sequence in users.sequences.items()
    }
    for added in changes.added:
        if added.scene not in sequences:
            raise LongtrailError(
                f"changes add a behaviour of scene {added.scene!r}; there are "
                f"{', '.join(sequences)}"
            )
        key = behavior_id(_text(added, title, normalize))
        sequences[added.scene] = _with(
            sequences[added.scene], key, item_key(added.item_id), history.now
        )
    return replace(users, sequences=sequences, outputs=None)


def _text(
    added: AddedBehavior, title: Callable[[str], str | None], normalize: Callable[[str], str]
) -> str:
    text = normalize(added.text) if added.text is not None else None
    if text is None and added.item_id is not None:
        text = title(added.item_id)
    if not text:
        raise LongtrailError(
            "changes add a behaviour without a text: give text, or the item_id of an item that has "
            "a title"
        )
    return text


def _without(sequence: SceneSequence, positions: list[int]) -> SceneSequence:
    """Leave behaviours out; what is older moves up."""
    if not positions:
        return sequence

    def left(column: NDArray[np.int64]) -> NDArray[np.int64]:
        kept = np.delete(column[0], positions)
        return np.concatenate([np.zeros(column.shape[1] - len(kept), dtype=np.int64), kept])[None]

    return SceneSequence(
        left(sequence.behavior_ids),
        left(sequence.item_keys),
        left(sequence.timestamps),
        sequence.total - len(set(positions)),
    )


def _with(sequence: SceneSequence, behavior: int, item: int, seconds: int) -> SceneSequence:
    """Append a behaviour; the oldest goes where there is no room."""

    def grown(column: NDArray[np.int64], value: int) -> NDArray[np.int64]:
        return np.append(column[0, 1:], value)[None]

    return SceneSequence(
        grown(sequence.behavior_ids, behavior),
        grown(sequence.item_keys, item),
        grown(sequence.timestamps, seconds),
        sequence.total + 1,
    )
