"""Requests that were answered, with the features they were answered from, as rows of a table.

One row is complete in itself. Serving writes rows (:mod:`serving.served_log`),
:mod:`feature_repo.served_parity` and :mod:`feature_repo.served_impressions` read them, both from
the files of :mod:`feature_repo.served_files`.

Lists are flat: the behaviours of all scenes end to end, the dense values item by item. An item's
neighbours (:mod:`feature_repo.item_neighbors`) take 1 KB and do not compress, so the log has their
hash. An item's key is not logged: it is a hash of its id.

Shapes: T = logged items of a request, F = dense columns, K = categorical columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from feature_repo.behavior import hash63_bytes
from feature_repo.columns import Ragged
from feature_repo.features import SceneSequence, UserFeatures
from feature_repo.moments import micros

_TIME = pa.timestamp("us", tz="UTC")
_WORDS, _LONGS, _FLOATS = pa.list_(pa.string()), pa.list_(pa.int64()), pa.list_(pa.float32())
SCHEMA = pa.schema(
    {
        "request_id": pa.string(),
        "served_at": _TIME,  # by the clock on the wall; the folder's date
        "user_id": pa.string(),
        "user_at": _TIME,  # the moment that the user was read for
        "items_at": _TIME,  # the moment that the items were read for
        "run": pa.string(),
        "encoder": pa.string(),
        "path": pa.string(),
        "degraded": _WORDS,
        "context_names": _WORDS,
        "context_values": pa.list_(pa.float64()),
        "known": pa.bool_(),
        "scenes": _WORDS,
        "totals": _LONGS,
        "lengths": _LONGS,  # kept behaviours of each scene
        "behavior_ids": _LONGS,
        "item_keys": _LONGS,
        "timestamps": _LONGS,
        "user_dense_names": _WORDS,
        "user_dense": _FLOATS,
        "num_scored": pa.int64(),
        "num_returned": pa.int64(),
        "item_ids": _WORDS,  # best first
        "logits": _FLOATS,
        "text_ids": _LONGS,
        "item_dense_names": _WORDS,
        "item_dense": _FLOATS,
        "category_names": _WORDS,
        "categories": pa.list_(pa.int32()),
        "neighbors": _LONGS,
    }
)
_NOTHING = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class ServedItems:
    """The logged items of a request, best first.

    Args:
        item_ids: str objects [T].
        logits: float32 [T].
        text_ids: int64 [T]; 0 where the item has no text.
        dense: float32 [T, F]; NaN where missing.
        dense_names: The F names.
        categories: int32 [T, K]; index into the run's vocabularies, 0 = unknown or missing.
        category_names: The K names.
        neighbors: int64 [T]; :func:`neighbor_hashes`.
    """

    item_ids: NDArray[np.object_]
    logits: NDArray[np.float32]
    text_ids: NDArray[np.int64]
    dense: NDArray[np.float32]
    dense_names: tuple[str, ...]
    categories: NDArray[np.int32]
    category_names: tuple[str, ...]
    neighbors: NDArray[np.int64]


@dataclass(frozen=True)
class ServedRequest:
    """A request that was answered.

    Args:
        request_id: As the service named it.
        served_at: When it was answered, by the clock on the wall, UTC.
        items_at: The moment that the items were read for, UTC.
        run: The model.
        encoder: Fingerprint of its encoder.
        path: Where the user's deep outputs came from.
        degraded: Why the answer was worse than it could be; empty as a rule.
        context: What the request itself told.
        user: The one user as read, at the moment of the request.
        num_scored: Items that the model scored.
        num_returned: Items that were returned: the first of ``items``, where so many were logged.
        items: The best of them.
    """

    request_id: str
    served_at: datetime
    items_at: datetime
    run: str
    encoder: str
    path: str
    degraded: tuple[str, ...]
    context: dict[str, float]
    user: UserFeatures
    num_scored: int
    num_returned: int
    items: ServedItems


def neighbor_hashes(keys: NDArray[np.int64], weights: NDArray[np.float32]) -> NDArray[np.int64]:
    """63-bit hashes of the neighbours of R items, int64 [R].

    Args:
        keys: int64 [R, N]; keys of the items nearest to each.
        weights: float32 [R, N, 2].
    """
    keys, weights = np.ascontiguousarray(keys), np.ascontiguousarray(weights)
    hashes = (
        hash63_bytes(key.tobytes() + weight.tobytes())
        for key, weight in zip(keys, weights, strict=True)
    )
    return np.fromiter(hashes, dtype=np.int64, count=len(keys))


def kept(sequence: SceneSequence) -> tuple[Ragged, Ragged, Ragged]:
    """Behaviour ids, item keys and times of the kept behaviours, without padding."""
    mask = sequence.mask
    lengths = mask.sum(axis=1).astype(np.int64)
    columns = (sequence.behavior_ids, sequence.item_keys, sequence.timestamps)
    first, second, third = (Ragged(column[mask], lengths) for column in columns)
    return first, second, third


def to_table(requests: Sequence[ServedRequest]) -> pa.Table:
    """Rows of :data:`SCHEMA`, one per request; at least one."""
    users, items = [r.user for r in requests], [r.items for r in requests]
    sequences = [[kept(s) for s in user.sequences.values()] for user in users]
    columns: dict[str, Any] = {
        "request_id": [r.request_id for r in requests],
        "served_at": [r.served_at for r in requests],
        "user_id": [str(user.user_ids[0]) for user in users],
        "user_at": [int(user.request_times[0]) for user in users],
        "items_at": [r.items_at for r in requests],
        "run": [r.run for r in requests],
        "encoder": [r.encoder for r in requests],
        "path": [r.path for r in requests],
        "degraded": [r.degraded for r in requests],
        "context_names": [list(r.context) for r in requests],
        "context_values": [list(r.context.values()) for r in requests],
        "known": [bool(user.found[0]) for user in users],
        "scenes": [list(user.sequences) for user in users],
        "totals": [[int(s.total[0]) for s in user.sequences.values()] for user in users],
        "lengths": [[int(ids.lengths[0]) for ids, _, _ in scenes] for scenes in sequences],
        "user_dense_names": [user.dense_names for user in users],
        "user_dense": _flat([user.dense for user in users], pa.float32()),
        "num_scored": [r.num_scored for r in requests],
        "num_returned": [r.num_returned for r in requests],
        "item_ids": [i.item_ids.tolist() for i in items],
        "logits": _flat([i.logits for i in items], pa.float32()),
        "text_ids": _flat([i.text_ids for i in items], pa.int64()),
        "item_dense_names": [i.dense_names for i in items],
        "item_dense": _flat([i.dense for i in items], pa.float32()),
        "category_names": [i.category_names for i in items],
        "categories": _flat([i.categories for i in items], pa.int32()),
        "neighbors": _flat([i.neighbors for i in items], pa.int64()),
    }
    for part, name in enumerate(("behavior_ids", "item_keys", "timestamps")):
        lists = [[scene[part].values for scene in scenes] for scenes in sequences]
        joined = [np.concatenate([_NOTHING, *of_user]) for of_user in lists]
        columns[name] = _flat(joined, pa.int64())
    arrays = [
        columns[field.name]
        if isinstance(columns[field.name], pa.Array)
        else pa.array(columns[field.name], field.type)
        for field in SCHEMA
    ]
    return pa.table(arrays, schema=SCHEMA)


def _flat(arrays: Sequence[NDArray[Any]], kind: pa.DataType) -> pa.ListArray:
    """One list per array, of all its values."""
    offsets = np.cumsum([0, *(array.size for array in arrays)], dtype=np.int32)
    values = np.concatenate([array.reshape(-1) for array in arrays])
    # from_pandas would make NaN null: what was read is what is logged.
    return pa.ListArray.from_arrays(offsets, pa.array(values, kind, from_pandas=False))


def from_row(row: Mapping[str, Any]) -> ServedRequest:
    """The request of a row of :data:`SCHEMA`, by column as Arrow scalars."""

    def plain(name: str) -> Any:
        return row[name].as_py()

    def numbers(name: str) -> NDArray[Any]:
        return np.asarray(row[name].values.to_numpy(zero_copy_only=False)).copy()

    return ServedRequest(
        request_id=plain("request_id"),
        served_at=plain("served_at").astimezone(UTC),
        items_at=plain("items_at").astimezone(UTC),
        run=plain("run"),
        encoder=plain("encoder"),
        path=plain("path"),
        degraded=tuple(plain("degraded")),
        context=dict(zip(plain("context_names"), plain("context_values"), strict=True)),
        user=_user(plain, numbers),
        num_scored=plain("num_scored"),
        num_returned=plain("num_returned"),
        items=_items(plain, numbers),
    )


def _user(plain: Any, numbers: Any) -> UserFeatures:
    lengths = numbers("lengths")
    ends = np.cumsum(lengths)
    parts = [numbers(name) for name in ("behavior_ids", "item_keys", "timestamps")]
    sequences = {}
    for scene, total, end, length in zip(
        plain("scenes"), plain("totals"), ends, lengths, strict=True
    ):
        ids, keys, times = (part[None, end - length : end] for part in parts)
        sequences[scene] = SceneSequence(ids, keys, times, np.array([total], dtype=np.int64))
    return UserFeatures(
        user_ids=np.array([plain("user_id")], dtype=object),
        request_times=np.array([micros(plain("user_at"))], dtype=np.int64),
        found=np.array([plain("known")]),
        sequences=sequences,
        dense=numbers("user_dense")[None],
        dense_names=tuple(plain("user_dense_names")),
    )


def _items(plain: Any, numbers: Any) -> ServedItems:
    names, categories = tuple(plain("item_dense_names")), tuple(plain("category_names"))
    item_ids = np.array(plain("item_ids"), dtype=object)
    return ServedItems(
        item_ids=item_ids,
        logits=numbers("logits"),
        text_ids=numbers("text_ids"),
        dense=numbers("item_dense").reshape(len(item_ids), len(names)),
        dense_names=names,
        categories=numbers("categories").reshape(len(item_ids), len(categories)),
        category_names=categories,
        neighbors=numbers("neighbors"),
    )
