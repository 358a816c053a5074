"""A user's kept behaviours of all scenes in one list, newest first."""

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from feature_repo.features import UserFeatures


@dataclass(frozen=True)
class Behavior:
    """One behaviour, for people."""

    text: str
    scene: str
    time: datetime


@dataclass(frozen=True)
class History:
    """L behaviours, newest first; of one time, scenes in the reader's order, later entries first.

    Args:
        scenes: Scene of each behaviour, str objects [L].
        behavior_ids: int64 [L], never 0.
        item_keys: int64 [L]; 0 where the event named no item.
        timestamps: int64 [L]; epoch seconds.
        now: Epoch seconds of the request.
    """

    scenes: NDArray[np.object_]
    behavior_ids: NDArray[np.int64]
    item_keys: NDArray[np.int64]
    timestamps: NDArray[np.int64]
    now: int

    @classmethod
    def of(cls, users: UserFeatures) -> "History":
        """Return the history of the only user in ``users``."""
        assert len(users.user_ids) == 1, users.user_ids
        parts = []
        for scene, sequence in users.sequences.items():
            keep = np.flatnonzero(sequence.mask[0])[::-1]
            name = np.full(len(keep), scene, dtype=object)
            columns = (sequence.behavior_ids, sequence.item_keys, sequence.timestamps)
            parts.append((name, *(column[0, keep] for column in columns)))
        scenes, behavior_ids, item_keys, timestamps = (
            np.concatenate(column) for column in zip(*parts, strict=True)
        )
        order = np.argsort(-timestamps, kind="stable")
        return cls(
            scenes=scenes[order],
            behavior_ids=behavior_ids[order],
            item_keys=item_keys[order],
            timestamps=timestamps[order],
            now=int(users.request_times[0]) // 1_000_000,
        )

    def __len__(self) -> int:
        return len(self.behavior_ids)

    def behaviors(self, texts: list[str]) -> tuple[Behavior, ...]:
        """Return the entries with their texts, in the order of the arrays."""
        return tuple(
            Behavior(text=text, scene=str(scene), time=datetime.fromtimestamp(int(seconds), UTC))
            for text, scene, seconds in zip(texts, self.scenes, self.timestamps, strict=True)
        )
