"""A user's kept behaviours of all scenes in one list, newest first."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
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
    item_id: str | None = None
    """What it is about, where that is an item of the catalogue."""


@dataclass(frozen=True)
class History:
    """L behaviours, newest first; of one time, scenes in the reader's order, later entries first.

    Args:
        scenes: Scene of each behaviour, str objects [L].
        behavior_ids: int64 [L], never 0.
        item_keys: int64 [L]; 0 where the event named no item.
        timestamps: int64 [L]; epoch seconds.
        positions: int64 [L]; place of each in its scene's sequence.
        now: Epoch seconds of the request.
    """

    scenes: NDArray[np.object_]
    behavior_ids: NDArray[np.int64]
    item_keys: NDArray[np.int64]
    timestamps: NDArray[np.int64]
    positions: NDArray[np.int64]
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
            parts.append((name, *(column[0, keep] for column in columns), keep))
        scenes, behavior_ids, item_keys, timestamps, positions = (
            np.concatenate(column) for column in zip(*parts, strict=True)
        )
        order = np.argsort(-timestamps, kind="stable")
        return cls(
            scenes=scenes[order],
            behavior_ids=behavior_ids[order],
            item_keys=item_keys[order],
            timestamps=timestamps[order],
            positions=positions[order],
            now=int(users.request_times[0]) // 1_000_000,
        )

    def __len__(self) -> int:
        return len(self.behavior_ids)

    @property
    def age_s(self) -> float | None:
        """Seconds since the newest behaviour; None without one."""
        return float(self.now - self.timestamps[0]) if len(self) else None

    def newest(self, number: int) -> "History":
        """Only the newest behaviours, at most ``number``."""
        columns = {
            field.name: getattr(self, field.name)[:number]
            for field in fields(self)
            if field.name != "now"
        }
        return replace(self, **columns)

    def behaviors(
        self, texts: Sequence[str], item_ids: Sequence[str | None]
    ) -> tuple[Behavior, ...]:
        """Return the entries with their texts and items, in the order of the arrays."""
        columns = zip(texts, self.scenes, self.timestamps, item_ids, strict=True)
        return tuple(
            Behavior(text, str(scene), datetime.fromtimestamp(int(seconds), UTC), item_id)
            for text, scene, seconds, item_id in columns
        )
