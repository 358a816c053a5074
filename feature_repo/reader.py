"""The one reader: features as numpy arrays, the same offline and online.

Nothing else in the project asks Feast for features. What a store does differently is levelled here:
row order and count, time zones, expired rows, unknown keys, nulls.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, Literal

import ibis
import numpy as np
import pandas as pd
import pyarrow as pa
from feast import FeatureStore, FeatureView
from feast.errors import FeastObjectNotFoundException
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus
from numpy.typing import NDArray

from feature_repo.artifact import current_run, served_encoder
from feature_repo.behavior import item_key
from feature_repo.columns import (
    Columns,
    Ragged,
    check_columns,
    column_from_arrow,
    column_from_values,
)
from feature_repo.definitions import CTR_SERVICE
from feature_repo.errors import MissingStepError, StoreError
from feature_repo.feast_bytes import VALUE_FIELDS, column_from_bytes
from feature_repo.features import ItemFeatures, SceneSequence, UserFeatures
from feature_repo.home import Home
from feature_repo.item_neighbors import NEIGHBOR_FIELDS, NUM_NEIGHBORS
from feature_repo.manifest import DataManifest, load_manifest
from feature_repo.offline import OfflineStore, open_offline
from feature_repo.offline_files import STEPS
from feature_repo.profiles import DEFAULT_PROFILE, open_store
from feature_repo.redis_lookup import RedisLookup
from feature_repo.version_names import Entity, encoder_view, run_view, unversioned

Source = Literal["offline", "online"]
Join = Literal["fast", "feast"]
"""``feast`` asks Feast's own historical retrieval, ``fast`` reads the same rows with the join of
:mod:`feature_repo.offline`; the values are equal."""

_ONLINE_KEYS = 1000
"""Keys per online request: bounds the response's size."""
_DAY_S = 86_400.0


@dataclass(frozen=True)
class _View:
    """What the reader must know of a feature view."""

    name: str
    key: str
    ttl: timedelta | None
    kinds: dict[str, str]
    """Feature -> field of a protobuf ``Value``, in the order of the service."""


class FeatureReader:
    """Reads features of users, items and behaviours.

    Args:
        home: Where the stores are.
        profile: Which stores.
        service: Feature service whose features are read.

    Raises:
        MissingStepError: If ingest or apply has not been run.
    """

    def __init__(
        self, home: Home, profile: str = DEFAULT_PROFILE, *, service: str = CTR_SERVICE
    ) -> None:
        self.home = home
        self.manifest: DataManifest = load_manifest(home)
        self.store: FeatureStore = open_store(home, profile)
        self.offline: OfflineStore = open_offline(self.store)
        self._lookups: dict[tuple[tuple[str, ...], ...], RedisLookup] = {}
        try:
            projections = self.store.get_feature_service(service).feature_view_projections
            views = [self._view(p.name, [f.name for f in p.features]) for p in projections]
        except FeastObjectNotFoundException as error:
            raise MissingStepError(
                f"the feature store does not know the service {service}: run `longtrail apply` "
                "first"
            ) from error
        self._user_views = [view for view in views if view.key == "user_id"]
        self._item_views = [view for view in views if view.key == "item_id"]

    def _view(self, name: str, features: Sequence[str]) -> _View:
        view: FeatureView = self.store.get_feature_view(name)
        types = {field.name: field.dtype for field in view.schema}
        return _View(
            name=name,
            key=view.entity_columns[0].name,
            ttl=view.ttl or None,
            kinds={feature: VALUE_FIELDS[types[feature]] for feature in features},
        )

    @property
    def sequence_length(self) -> int:
        """N, behaviours kept per scene."""
        return self.manifest.sequence_length

    # Names, in the order of the arrays.
    @cached_property
    def user_dense_names(self) -> tuple[str, ...]:
        """Names of the columns of :attr:`UserFeatures.dense`."""
        sequence_fields = set(self._sequence_fields())
        return _dense_names(self._user_views, without=sequence_fields)

    @cached_property
    def item_dense_names(self) -> tuple[str, ...]:
        """Names of the columns of :attr:`ItemFeatures.dense`."""
        return _dense_names(self._item_views, without={"text_id"})

    @cached_property
    def item_category_names(self) -> tuple[str, ...]:
        """Names of the columns of :attr:`ItemFeatures.categorical`."""
        return tuple(
            name
            for view in self._item_views
            for name, kind in view.kinds.items()
            if kind == "string_val"
        )

    def _sequence_fields(self) -> Iterator[str]:
        for scene in self.manifest.scenes:
            for part in ("behavior_ids", "item_keys", "timestamps", "total"):
                yield f"{scene}_{part}"

    def request_times(self, num: int, at: datetime | None = None) -> NDArray[np.int64]:
        """``num`` times the same moment, epoch microseconds; the data set's "now" by default.

        Raises:
            ValueError: If ``at`` has no time zone.
        """
        moment = at or self.manifest.now()
        if moment.tzinfo is None:
            raise ValueError(f"at must have a time zone, got {moment}")
        epoch = datetime(1970, 1, 1, tzinfo=UTC)
        return np.full(num, (moment - epoch) // timedelta(microseconds=1), dtype=np.int64)

    # Offline.
    def historical_users(
        self,
        user_ids: Sequence[str] | NDArray[np.object_],
        request_times: NDArray[np.int64],
        *,
        join: Join = "fast",
    ) -> UserFeatures:
        """Users as they were known at the request times; as many rows as asked, in that order.

        Args:
            user_ids: R ids.
            request_times: int64 [R]; epoch microseconds, UTC.
            join: How the rows are found.
        """
        ids = np.asarray(user_ids, dtype=object)
        columns = self._historical(self._user_views, ids, request_times, join)
        return self._users(ids, request_times, columns)

    def historical_items(
        self,
        item_ids: Sequence[str] | NDArray[np.object_],
        request_times: NDArray[np.int64],
        *,
        join: Join = "fast",
    ) -> ItemFeatures:
        """Items as they were known at the request times; see :meth:`historical_users`."""
        ids = np.asarray(item_ids, dtype=object)
        columns = self._historical(self._item_views, ids, request_times, join)
        return self._items(ids, request_times, columns)

    # Online.
    def online_users(
        self, user_ids: Sequence[str] | NDArray[np.object_], *, at: datetime | None = None
    ) -> UserFeatures:
        """Users as the online store knows them.

        Args:
            user_ids: R ids.
            at: The moment of the request, for ages and expiry; the data set's "now" by default.
        """
        ids = np.asarray(user_ids, dtype=object)
        times = self.request_times(len(ids), at)
        return self._users(ids, times, self._online(self._user_views, ids, times))

    def online_items(
        self, item_ids: Sequence[str] | NDArray[np.object_], *, at: datetime | None = None
    ) -> ItemFeatures:
        """Items as the online store knows them; see :meth:`online_users`."""
        ids = np.asarray(item_ids, dtype=object)
        times = self.request_times(len(ids), at)
        return self._items(ids, times, self._online(self._item_views, ids, times))

    # One view, whole.
    def historical_columns(
        self,
        view: str,
        keys: NDArray[Any],
        request_times: NDArray[np.int64],
        *,
        join: Join = "fast",
    ) -> Columns:
        """All features of an applied view, of any service or none, as known at the request times.

        Args:
            view: Its name.
            keys: R keys: str objects, or int64 as the view's join key.
            request_times: int64 [R]; epoch microseconds, UTC.
            join: How the rows are found.
        """
        whole = self._whole(view)
        return self._historical([whole], keys, request_times, join)[view]

    def online_columns(
        self, view: str, keys: NDArray[Any], *, at: datetime | None = None
    ) -> Columns:
        """The same as the online store knows it; see :meth:`online_users` for ``at``."""
        times = self.request_times(len(keys), at)
        return self._online([self._whole(view)], keys, times)[view]

    def _whole(self, view: str) -> _View:
        return self._view(view, [f.name for f in self.store.get_feature_view(view).features])

    def vectors(
        self,
        behavior_ids: NDArray[np.int64],
        *,
        source: Source,
        encoder: str | None = None,
        at: datetime | None = None,
    ) -> NDArray[np.float32]:
        """Vectors of behaviours as the feature store has them: the truth behind the mapped table.

        Args:
            behavior_ids: int64 [R].
            source: Which store.
            encoder: Fingerprint of the version; None = of :func:`served_encoder`.
            at: The moment of the request; the data set's "now" by default.

        Returns:
            float32 [R, D]; a row of NaN where the store has no vector.

        Raises:
            MissingStepError: If the store does not know this version.
        """
        view = encoder_view(encoder or served_encoder(self.home))
        return self._vectors(view, behavior_ids, source, at)

    def deep_outputs(
        self,
        entity: Entity,
        ids: Sequence[str] | NDArray[np.object_],
        *,
        source: Source,
        run: str | None = None,
        at: datetime | None = None,
    ) -> NDArray[np.float32]:
        """Vectors of users or items that a run's model computed, as export wrote them.

        Args:
            entity: Whose.
            ids: R ids.
            source: Which store.
            run: The version; None = the run that is served.
            at: The moment of the request; the data set's "now" by default.

        Returns:
            float32 [R, D]; a row of NaN where the store has no vector.

        Raises:
            MissingStepError: If the store does not know this version.
        """
        view = run_view(entity, run or current_run(self.home))
        return self._vectors(view, np.asarray(ids, dtype=object), source, at)

    def _vectors(
        self, name: str, keys: NDArray[Any], source: Source, at: datetime | None
    ) -> NDArray[np.float32]:
        try:
            view = self._view(name, ["embedding"])
        except FeastObjectNotFoundException as error:
            step = STEPS[unversioned(name)]
            raise MissingStepError(
                f"the feature store does not know {name}: run `longtrail {step}` and `longtrail "
                "apply` first; `longtrail versions` lists what there is"
            ) from error
        times = self.request_times(len(keys), at)
        if source == "offline":
            columns = self._historical([view], keys, times, "fast")
        else:
            columns = self._online([view], keys, times)
        column = columns[name].values["embedding"]
        assert isinstance(column, Ragged)
        width = int(column.lengths.max(initial=0))
        vectors = np.full((len(keys), width), np.nan, dtype=np.float32)
        vectors[column.lengths > 0] = column.values.reshape(-1, width) if width else 0
        return vectors

    # How the rows are found.
    def _historical(
        self, views: Sequence[_View], keys: NDArray[Any], times: NDArray[np.int64], join: Join
    ) -> dict[str, Columns]:
        if len(keys) != len(times):
            raise ValueError(f"expected one time per key, got {len(keys)} and {len(times)}")
        read = self._by_fast_join if join == "fast" else self._by_feast
        return {view.name: read(view, keys, times) for view in views}

    def _by_fast_join(self, view: _View, keys: NDArray[Any], times: NDArray[np.int64]) -> Columns:
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

    def _by_feast(self, view: _View, keys: NDArray[Any], times: NDArray[np.int64]) -> Columns:
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
        _release_ibis()
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

    def _online(
        self, views: Sequence[_View], keys: NDArray[Any], times: NDArray[np.int64]
    ) -> dict[str, Columns]:
        parts = [
            self._online_chunk(views, keys[i : i + _ONLINE_KEYS], times[i : i + _ONLINE_KEYS])
            for i in range(0, max(len(keys), 1), _ONLINE_KEYS)
        ]
        return {view.name: _concatenate([part[view.name] for part in parts]) for view in views}

    def _online_chunk(
        self, views: Sequence[_View], keys: NDArray[Any], times: NDArray[np.int64]
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
        self, views: Sequence[_View], keys: Sequence[Any], times: NDArray[np.int64]
    ) -> dict[str, Columns]:
        """Features of Feast's own online retrieval, which knows every store."""
        (key,) = {view.key for view in views}
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
        self, views: Sequence[_View], keys: Sequence[Any], times: NDArray[np.int64]
    ) -> dict[str, Columns]:
        """The same in one round trip, one command per key; a test holds both against each other."""
        names = tuple((view.name, *view.kinds) for view in views)
        if names not in self._lookups:
            wanted = [(self.store.get_feature_view(v.name), list(v.kinds)) for v in views]
            self._lookups[names] = RedisLookup(self.store, wanted)
        columns = {}
        for view, (written, messages) in zip(views, self._lookups[names].read(keys), strict=True):
            valid = _unexpired(written, times, view.ttl)
            present = np.zeros(len(keys), dtype=bool)
            values = {}
            for (name, kind), column in zip(view.kinds.items(), messages, strict=True):
                values[name] = column_from_bytes(column, valid, kind)
                present |= valid & [bool(message) for message in column]
            columns[view.name] = Columns(present, values)
        return columns

    # From columns to features.
    def _users(
        self, ids: NDArray[np.object_], times: NDArray[np.int64], columns: dict[str, Columns]
    ) -> UserFeatures:
        values = {name: c for view in columns.values() for name, c in view.values.items()}
        sequences = {}
        for scene in self.manifest.scenes:
            lists = []
            for part in ("behavior_ids", "item_keys", "timestamps"):
                ragged = values[f"{scene}_{part}"]
                assert isinstance(ragged, Ragged)
                lists.append(ragged.right_aligned(self.manifest.sequence_length))
            total = values[f"{scene}_total"]
            assert isinstance(total, np.ndarray)
            sequences[scene] = SceneSequence(lists[0], lists[1], lists[2], total)
        present = np.zeros(len(ids), dtype=bool)
        for view in columns.values():
            present |= view.present
        return UserFeatures(
            user_ids=ids,
            request_times=times,
            found=present,
            sequences=sequences,
            dense=_dense(self._user_views, columns, times, set(self._sequence_fields())),
            dense_names=self.user_dense_names,
        )

    def _items(
        self, ids: NDArray[np.object_], times: NDArray[np.int64], columns: dict[str, Columns]
    ) -> ItemFeatures:
        items = columns["items"]
        text_ids = items.values["text_id"]
        near = [columns["item_neighbors"].values[name] for name in NEIGHBOR_FIELDS]
        keys, *weights = (
            ragged.right_aligned(NUM_NEIGHBORS) for ragged in near if isinstance(ragged, Ragged)
        )
        assert isinstance(text_ids, np.ndarray)
        return ItemFeatures(
            item_ids=ids,
            request_times=times,
            found=items.present,
            item_keys=_item_keys(ids),
            text_ids=text_ids,
            dense=_dense(self._item_views, columns, times, {"text_id"}),
            dense_names=self.item_dense_names,
            categorical={
                name: column
                for view in columns.values()
                for name in self.item_category_names
                if isinstance(column := view.values.get(name), np.ndarray)
            },
            neighbor_keys=keys,
            neighbor_weights=np.stack(weights, axis=-1),
        )


def _release_ibis() -> None:
    """Close the connection that Feast's DuckDB store opens in ibis, with all that it registered.

    Left open it keeps every entity table, and complains about leaks when the interpreter ends.
    """
    backend, ibis.options.default_backend = ibis.options.default_backend, None
    if backend is not None:
        backend.disconnect()


def _key_array(view: _View, keys: Any) -> pa.Array:
    if view.key == "behavior_id":
        return pa.array(np.asarray(keys, dtype=np.int64))
    return pa.array(keys, pa.string())


def _item_keys(ids: NDArray[np.object_]) -> NDArray[np.int64]:
    codes, distinct = pd.factorize(ids)
    keys = np.array([item_key(value) for value in distinct], dtype=np.int64)
    return keys[codes] if len(keys) else np.zeros(0, dtype=np.int64)


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


def _is_dense(name: str, kind: str, without: set[str]) -> bool:
    return kind in ("int64_val", "float_val", "double_val") and name not in without


def _dense_names(views: Sequence[_View], without: set[str]) -> tuple[str, ...]:
    """A moment (``x_time``) becomes an age in days at the request (``x_age_days``)."""
    return tuple(
        f"{name.removesuffix('_time')}_age_days" if name.endswith("_time") else name
        for view in views
        for name, kind in view.kinds.items()
        if _is_dense(name, kind, without)
    )


def _dense(
    views: Sequence[_View],
    columns: dict[str, Columns],
    times: NDArray[np.int64],
    without: set[str],
) -> NDArray[np.float32]:
    """float32 [R, F], NaN where missing."""
    dense = []
    for view in views:
        of_view = columns[view.name]
        for name, kind in view.kinds.items():
            if not _is_dense(name, kind, without):
                continue
            values = of_view.values[name]
            assert isinstance(values, np.ndarray)
            column = np.where(of_view.present, values, np.nan)
            if name.endswith("_time"):
                column = (times / 1e6 - column) / _DAY_S
            dense.append(column.astype(np.float32))
    return np.stack(dense, axis=1) if dense else np.zeros((len(times), 0), dtype=np.float32)
