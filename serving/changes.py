"""A history that might have been: for "what if" questions; nothing is stored."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from feature_repo.behavior import behavior_id, item_key
from feature_repo.features import SceneSequence, UserFeatures
from serving.answers import AddedBehavior, HistoryChanges, UnusableChangeError
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
        UnusableChangeError: If a place or scene is not there, or an added behaviour has no text.
    """
    history = History.of(users)
    removed: dict[str, list[int]] = {}
    for number, place in enumerate(changes.removed):
        if not 0 <= place < len(history):
            raise UnusableChangeError(
                f"the history has {_behaviors(len(history))}, counted from 0",
                place=("removed", number),
            )
        removed.setdefault(str(history.scenes[place]), []).append(int(history.positions[place]))
    sequences = {
        scene: _without(sequence, removed.get(scene, []))
        for scene, sequence in users.sequences.items()
    }
    for number, added in enumerate(changes.added):
        if added.scene not in sequences:
            raise UnusableChangeError(
                f"there is no such scene; there are {', '.join(sequences)}",
                place=("added", number, "scene"),
            )
        key = behavior_id(_text(added, number, title, normalize))
        sequences[added.scene] = _with(
            sequences[added.scene], key, item_key(added.item_id), history.now
        )
    return replace(users, sequences=sequences, outputs=None)


def _text(
    added: AddedBehavior,
    number: int,
    title: Callable[[str], str | None],
    normalize: Callable[[str], str],
) -> str:
    if added.text is not None:
        text = normalize(added.text)
        if not text:
            raise UnusableChangeError("the text is blank", place=("added", number, "text"))
        return text
    if added.item_id is None:
        raise UnusableChangeError("text or item_id is needed", place=("added", number))
    text = title(added.item_id) or ""
    if not text:
        raise UnusableChangeError(
            "the item has no title that could be the text: give text",
            place=("added", number, "item_id"),
        )
    return text


def _behaviors(number: int) -> str:
    return f"{number} behaviour{'' if number == 1 else 's'}"


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
