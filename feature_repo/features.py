"""What the one reader returns, offline and online: numpy arrays, never a store's own types.

Shapes: R = rows read, N = behaviours kept per scene, F = dense columns.

Sequences are right-aligned: the newest behaviour is always at index N-1, so "the last M" is
``[:, -M:]`` and the distance from the end is the same number for every user.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import datetime
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

_DAY_S = 86_400.0


@dataclass(frozen=True)
class SceneSequence:
    """The last N behaviours of one scene, oldest first.

    Args:
        behavior_ids: int64 [R, N]; 0 where there is none.
        item_keys: int64 [R, N]; 63-bit hash of the item id, 0 where the event names none.
        timestamps: int64 [R, N]; epoch seconds, 0 where there is none.
        total: int64 [R]; behaviours of all time, not only the kept ones.
    """

    behavior_ids: NDArray[np.int64]
    item_keys: NDArray[np.int64]
    timestamps: NDArray[np.int64]
    total: NDArray[np.int64]

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Bool [R, N]; True means keep: a behaviour is there."""
        mask: NDArray[np.bool_] = self.behavior_ids != 0
        return mask


@dataclass(frozen=True)
class KeptOutputs:
    """Deep outputs of users that a run's model computed at some moment before.

    Args:
        vectors: float32 [R, W]; NaN where the store has none.
        history_keys: int64 [R]; of the behaviours that they are of, 0 where there is none.
        computed_at: int64 [R]; epoch seconds, 0 where there is none.
    """

    vectors: NDArray[np.float32]
    history_keys: NDArray[np.int64]
    computed_at: NDArray[np.int64]


@dataclass(frozen=True)
class UserFeatures:
    """Users as they were known at their request times.

    Args:
        user_ids: str objects [R].
        request_times: int64 [R]; epoch microseconds, UTC.
        found: bool [R]; True where the store knows the user at that time.
        sequences: scene -> its sequences.
        dense: float32 [R, F]; NaN where missing or expired.
        dense_names: the F names.
        outputs: A run's deep outputs, where the reader reads those along.
    """

    user_ids: NDArray[np.object_]
    request_times: NDArray[np.int64]
    found: NDArray[np.bool_]
    sequences: dict[str, SceneSequence]
    dense: NDArray[np.float32]
    dense_names: tuple[str, ...]
    outputs: KeptOutputs | None = None

    def ages(self, scene: str) -> NDArray[np.float32]:
        """Seconds from each behaviour to the request, float32 [R, N]; 0 where there is none."""
        sequence = self.sequences[scene]
        seconds = self.request_times[:, None] // 1_000_000 - sequence.timestamps
        return np.where(sequence.mask, seconds, 0).astype(np.float32)


@dataclass(frozen=True)
class ItemFeatures:
    """Items as they were known at their request times.

    Args:
        item_ids: str objects [R].
        request_times: int64 [R]; epoch microseconds, UTC.
        found: bool [R]; True where the store knows the item at that time.
        item_keys: int64 [R]; what sequences hold for this item, computed from the id.
        text_ids: int64 [R]; behaviour id of the title, 0 where missing.
        dense: float32 [R, F]; NaN where missing or expired.
        dense_names: the F names.
        categorical: column name -> str objects [R], None where missing.
        neighbor_keys: int64 [R, K]; keys of the items nearest to each, 0 where there is none.
        neighbor_weights: float32 [R, K, 2]; over baskets and over users, 0 where there is none.
        age_names: The A of ``dense_names`` that are days from a moment to the request.
        moments: float64 [R, A]; these moments, epoch seconds, NaN where missing.
    """

    item_ids: NDArray[np.object_]
    request_times: NDArray[np.int64]
    found: NDArray[np.bool_]
    item_keys: NDArray[np.int64]
    text_ids: NDArray[np.int64]
    dense: NDArray[np.float32]
    dense_names: tuple[str, ...]
    categorical: dict[str, NDArray[np.object_]]
    neighbor_keys: NDArray[np.int64]
    neighbor_weights: NDArray[np.float32]
    age_names: tuple[str, ...] = ()
    moments: NDArray[np.float64] | None = None


def ages_days(
    moments: NDArray[np.float64], request_times: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Days from moments to requests.

    Args:
        moments: float64 [R, A]; epoch seconds, NaN where missing.
        request_times: int64 [R]; epoch microseconds.

    Returns:
        float32 [R, A].
    """
    seconds = request_times[:, None] / 1e6 - moments
    return (seconds / _DAY_S).astype(np.float32)


class OnlineReader(Protocol):
    """What serving asks of the one reader: as many rows as asked, in that order."""

    def online_users(
        self, user_ids: NDArray[np.object_], *, at: datetime | None = None
    ) -> UserFeatures:
        """Users as they are known at ``at``."""

    def online_items(
        self, item_ids: NDArray[np.object_], *, at: datetime | None = None
    ) -> ItemFeatures:
        """Items as they are known at ``at``."""


class Reader(OnlineReader, Protocol):
    """What training asks of the one reader, offline as well."""

    @property
    def sequence_length(self) -> int:
        """N, behaviours kept per scene."""

    def historical_users(
        self, user_ids: NDArray[np.object_], request_times: NDArray[np.int64]
    ) -> UserFeatures:
        """Users as known at their request times, epoch microseconds."""

    def historical_items(
        self, item_ids: NDArray[np.object_], request_times: NDArray[np.int64]
    ) -> ItemFeatures:
        """Items as known at their request times, epoch microseconds."""


Features = TypeVar("Features", UserFeatures, ItemFeatures)


def assemble(parts: Iterable[tuple[NDArray[np.int64], Features]], num_rows: int) -> Features:
    """Features that were read a part at a time, in one; memory is that of the result and a part.

    Args:
        parts: For each part the rows that it fills, int64, and their features; at least one part,
            and each of the ``num_rows`` rows in one of them.
        num_rows: R.
    """
    whole: Features | None = None
    for rows, part in parts:
        if whole is None:
            whole = _with_room(part, num_rows)
        _fill(whole, rows, part)
    assert whole is not None, "no part at all"
    return whole


def _with_room(value: Any, num_rows: int) -> Any:
    """The same with arrays of so many rows, which hold anything."""
    if isinstance(value, np.ndarray):
        return np.empty((num_rows, *value.shape[1:]), dtype=value.dtype)
    if isinstance(value, dict):
        return {name: _with_room(inner, num_rows) for name, inner in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        named = {f.name: _with_room(getattr(value, f.name), num_rows) for f in fields(value)}
        return replace(value, **named)
    return value


def _fill(whole: Any, rows: NDArray[np.int64], part: Any) -> None:
    """Put the arrays of a part into rows of the arrays of the whole."""
    if isinstance(whole, np.ndarray):
        whole[rows] = part
    elif isinstance(whole, dict):
        for name, inner in whole.items():
            _fill(inner, rows, part[name])
    elif is_dataclass(whole):
        for field in fields(whole):
            _fill(getattr(whole, field.name), rows, getattr(part, field.name))
