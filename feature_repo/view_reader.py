"""Rows of feature views as columns, the same offline and online.

What a store does differently is levelled here: row order and count, time zones, expired rows,
unknown keys, nulls.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import ibis
import numpy as np
import pandas as pd
import pyarrow as pa
from feast import FeatureStore, FeatureView
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus
from numpy.typing import NDArray

from feature_repo.columns import (
    Columns,
    Ragged,
    check_columns,
    column_from_arrow,
    column_from_values,
)
from feature_repo.errors import StoreError
from feature_repo.feast_bytes import VALUE_FIELDS, column_from_bytes
from feature_repo.offline import OfflineStore, open_offline
from feature_repo.online_sqlite import sqlite_errors
from feature_repo.redis_lookup import RedisLookup

Join = Literal["fast", "feast"]
"""``feast`` asks Feast's own historical retrieval, ``fast`` reads the same rows with the join of
:mod:`feature_repo.offline`; the values are equal."""

_ONLINE_KEYS = 1000
"""Keys per online request: bounds the response's size."""


@dataclass(frozen=True)
class ReadView:
    """What a reader must know of a feature view."""

    name: str
    key: str
    ttl: timedelta | None
    kinds: dict[str, str]
    """Feature -> field of a protobuf ``Value``, in the order of the service."""


class ViewReader:
    """Reads rows of applied feature views by key and time.

    Args:
        store: Feast's store.
    """

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        self.offline: OfflineStore = open_offline(store)
        self._lookups: dict[tuple[tuple[str, ...], ...], RedisLookup] = {}

    def view(self, name: str, features: Sequence[str]) -> ReadView:
        """Some features of an applied view.

        Raises:
            FeastObjectNotFoundException: If there is no view of that name.
        """
        view: FeatureView = self.store.get_feature_view(name)
        types = {field.name: field.dtype for field in view.schema}
        return ReadView(
            name=name,
            key=view.entity_columns[0].name,
            ttl=view.ttl or None,
            kinds={feature: VALUE_FIELDS[types[feature]] for feature in features},
        )

    def historical(
        self, views: Sequence[ReadView], keys: NDArray[Any], times: NDArray[np.int64], join: Join
    ) -> dict[str, Columns]:
        """View -> its rows as they were known at the times; as many as asked, in that order.

        Args:
            views: Of one entity.
            keys: R keys.
            times: int64 [R]; epoch microseconds, UTC.
            join: How the rows are found.
        """
        if len(keys) != len(times):
            raise ValueError(f"expected one time per key, got {len(keys)} and {len(times)}")
        read = self._by_fast_join if join == "fast" else self._by_feast
        return {view.name: read(view, keys, times) for view in views}

    def _by_fast_join(
        self, view: ReadView, keys: NDArray[Any], times: NDArray[np.int64]
    ) -> Columns:
        """Join the distinct (key, time) pairs, then repeat them as often as they were asked."""
        self.offline.require(view.name)
        codes, distinct = pd.factorize(keys)
        pairs, inverse = np.unique(
            np.stack([codes.astype(np.int64), times], axis=1), axis=0, return_inverse=True
        )
        rows, place = self.offline.latest_rows(
            view.name,
            keys=_key_array(view, distinct[pairs[:, 0]]),
            times=pairs[:, 1],
            ttl=view.ttl,
            columns=list(view.kinds),
        )
        check_columns(view.name, view.kinds, rows.schema)
        place = place[inverse.reshape(-1)]
        taken = rows.combine_chunks().take(pa.array(place, mask=place < 0))
        values = {name: column_from_arrow(taken[name]) for name in view.kinds}
        return Columns(place >= 0, values)

    def _by_feast(self, view: ReadView, keys: NDArray[Any], times: NDArray[np.int64]) -> Columns:
        """Feast's own join; a row id restores order and count, which it does not promise."""
        self.offline.require(view.name)
        entities = pd.DataFrame(
            {
                view.key: _key_array(view, keys).to_pandas(),
                "event_timestamp": pd.to_datetime(times, unit="us", utc=True),
                "request_row": np.arange(len(keys)),
            }
        )
        job = self.store.get_historical_features(
            entity_df=entities,
            features=[f"{view.name}:{name}" for name in view.kinds],
            full_feature_names=True,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # ibis about DuckDB's new names
            table = job.to_arrow().sort_by("request_row")
        release_ibis()
        if table["request_row"].to_numpy().tolist() != list(range(len(keys))):
            raise StoreError(
                f"the offline store returned {table.num_rows} rows of {view.name} for {len(keys)} "
                "requests; expected one each: its files hold two rows of equal key and times"
            )
        arrays = {name: table[f"{view.name}__{name}"] for name in view.kinds}
        present = np.zeros(len(keys), dtype=bool)
        for array in arrays.values():
            present |= array.is_valid().to_numpy()
        return Columns(present, {name: column_from_arrow(a) for name, a in arrays.items()})

    def online(
        self, views: Sequence[ReadView], keys: NDArray[Any], times: NDArray[np.int64]
    ) -> dict[str, Columns]:
        """The same as the online store knows them; ``times`` decide what has expired."""
        parts = [
            self._online_chunk(views, keys[i : i + _ONLINE_KEYS], times[i : i + _ONLINE_KEYS])
            for i in range(0, max(len(keys), 1), _ONLINE_KEYS)
        ]
        return {view.name: _concatenate([part[view.name] for part in parts]) for view in views}

    def _online_chunk(
        self, views: Sequence[ReadView], keys: NDArray[Any], times: NDArray[np.int64]
    ) -> dict[str, Columns]:
        if not len(keys):
            return {
                view.name: Columns(
                    np.zeros(0, dtype=bool),
                    {
                        n: column_from_values([], np.zeros(0, bool), k)
                        for n, k in view.kinds.items()
                    },
                )
                for view in views
            }
        plain = [int(k) for k in keys] if keys.dtype != object else keys.tolist()
        if self.store.config.online_store.type == "redis":
            return self._from_redis(views, plain, times)
        return self._from_response(views, plain, times)

    def _from_response(
        self, views: Sequence[ReadView], keys: Sequence[Any], times: NDArray[np.int64]
    ) -> dict[str, Columns]:
        """Features of Feast's own online retrieval, which knows every store."""
        (key,) = {view.key for view in views}
        with sqlite_errors():
            response = self.store.get_online_features(
                features=[f"{view.name}:{name}" for view in views for name in view.kinds],
                entity_rows=[{key: value} for value in keys],
                full_feature_names=True,
            ).proto
        # The order of features varies between processes: look them up by name.
        results = dict(zip(response.metadata.feature_names.val, response.results, strict=True))
        columns = {}
        for view in views:
            present = np.zeros(len(keys), dtype=bool)
            values = {}
            for name, kind in view.kinds.items():
                result = results[f"{view.name}__{name}"]
                valid = _valid(result, times, view.ttl)
                values[name] = column_from_values(result.values, valid, kind)
                present |= valid & [value.WhichOneof("val") is not None for value in result.values]
            columns[view.name] = Columns(present, values)
        return columns

    def _from_redis(
        self, views: Sequence[ReadView], keys: Sequence[Any], times: NDArray[np.int64]
    ) -> dict[str, Columns]:
        """The same in one round trip, one command per key; a test holds both against each other."""
        names = tuple((view.name, *view.kinds) for view in views)
        if names not in self._lookups:
            wanted = [(self.store.get_feature_view(v.name), list(v.kinds)) for v in views]
            self._lookups[names] = RedisLookup(self.store, wanted)
        columns = {}
        for view, (written, messages) in zip(views, self._lookups[names].read(keys), strict=True):
            valid = _unexpired(written, times, view.ttl)
            values = {
                name: column_from_bytes(column, valid, kind)
                for (name, kind), column in zip(view.kinds.items(), messages, strict=True)
            }
            held = [any(row) for row in zip(*messages, strict=True)]
            columns[view.name] = Columns(valid & held, values)
        return columns


def release_ibis() -> None:
    """Close the connection that Feast's DuckDB store opens in ibis, with all that it registered.

    Left open it keeps every entity table, and complains about leaks when the interpreter ends.
    """
    backend, ibis.options.default_backend = ibis.options.default_backend, None
    if backend is not None:
        backend.disconnect()


def _key_array(view: ReadView, keys: Any) -> pa.Array:
    if view.key == "behavior_id":
        return pa.array(np.asarray(keys, dtype=np.int64))
    return pa.array(keys, pa.string())


def _valid(result: Any, times: NDArray[np.int64], ttl: timedelta | None) -> NDArray[np.bool_]:
    """Which online values are there and not expired; the stores apply no time to live."""
    statuses = np.fromiter(result.statuses, dtype=np.int64, count=len(times))
    written = np.array([t.seconds * 1_000_000 + t.nanos // 1000 for t in result.event_timestamps])
    present: NDArray[np.bool_] = statuses == FieldStatus.PRESENT
    return present & _unexpired(written, times, ttl)


def _unexpired(
    written: NDArray[np.int64], times: NDArray[np.int64], ttl: timedelta | None
) -> NDArray[np.bool_]:
    valid: NDArray[np.bool_] = written != 0
    if ttl:
        valid &= written + ttl // timedelta(microseconds=1) >= times
    return valid


def _concatenate(parts: Sequence[Columns]) -> Columns:
    if len(parts) == 1:
        return parts[0]
    values: dict[str, Any] = {}
    for name in parts[0].values:
        columns = [part.values[name] for part in parts]
        if isinstance(columns[0], Ragged):
            ragged = [column for column in columns if isinstance(column, Ragged)]
            values[name] = Ragged(
                np.concatenate([r.values for r in ragged]),
                np.concatenate([r.lengths for r in ragged]),
            )
        else:
            values[name] = np.concatenate([c for c in columns if isinstance(c, np.ndarray)])
    return Columns(np.concatenate([part.present for part in parts]), values)
