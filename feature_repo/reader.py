"""The one reader: features as numpy arrays, the same offline and online.

Whatever lies above this package asks for features here alone. What a store does differently is
levelled here: row order and count, time zones, expired rows, unknown keys, nulls.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd
from feast import FeatureStore
from feast.errors import FeastObjectNotFoundException
from numpy.typing import NDArray

from feature_repo.artifact import current_run, served_encoder
from feature_repo.behavior import item_key
from feature_repo.columns import (
    Columns,
    Ragged,
)
from feature_repo.definitions import CTR_SERVICE
from feature_repo.errors import MissingStepError
from feature_repo.features import (
    Features,
    ItemFeatures,
    KeptOutputs,
    SceneSequence,
    UserFeatures,
    ages_days,
    assemble,
)
from feature_repo.home import Home
from feature_repo.item_neighbors import NEIGHBOR_FIELDS, NUM_NEIGHBORS
from feature_repo.live_offline import LiveOffline
from feature_repo.manifest import DataClock, DataManifest, load_manifest
from feature_repo.moments import micros
from feature_repo.offline_files import STEPS
from feature_repo.profiles import DEFAULT_PROFILE, open_store
from feature_repo.version_names import Entity, encoder_view, run_view, unversioned
from feature_repo.view_reader import Join, ReadView, ViewReader

Source = Literal["offline", "online"]
_KEPT_OUTPUTS = ("embedding", "history_key", "computed_time")
PART_REQUESTS = 32_768
"""Requests that are read at once: 80 MB of 3 x 100 ids, and about three times that on the way."""


class FeatureReader:
    """Reads features of users, items and behaviours.

    Args:
        home: Where the stores are.
        profile: Which stores.
        service: Feature service whose features are read.
        outputs_of: Run whose deep outputs of users are read along with their features online, where
            the store has them.
        part_requests: Most requests that are read offline at once, which bounds the memory on the
            way to the result.

    Raises:
        MissingStepError: If ingest or apply has not been run.
    """

    def __init__(
        self,
        home: Home,
        profile: str = DEFAULT_PROFILE,
        *,
        service: str = CTR_SERVICE,
        outputs_of: str | None = None,
        part_requests: int = PART_REQUESTS,
    ) -> None:
        self.home = home
        self._part_requests = part_requests
        self.manifest: DataManifest = load_manifest(home)
        self.store: FeatureStore = open_store(home, profile)
        self.views = ViewReader(self.store)
        self._live = LiveOffline(home, profile, self.store)
        self._clock = DataClock(home)
        try:
            projections = self.store.get_feature_service(service).feature_view_projections
            views = [self.views.view(p.name, [f.name for f in p.features]) for p in projections]
        except FeastObjectNotFoundException as error:
            raise MissingStepError(
                f"the feature store does not know the service {service}: run `longtrail apply` "
                "first"
            ) from error
        self._user_views = [view for view in views if view.key == "user_id"]
        self._item_views = [view for view in views if view.key == "item_id"]
        self._outputs_view: ReadView | None = None
        if outputs_of is not None:
            with suppress(FeastObjectNotFoundException):
                self._outputs_view = self.views.view(run_view("user", outputs_of), _KEPT_OUTPUTS)

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
    def item_age_names(self) -> tuple[str, ...]:
        """Those of :attr:`item_dense_names` that are made from moments."""
        return tuple(
            _dense_name(name)
            for view in self._item_views
            for name, kind in view.kinds.items()
            if _is_dense(name, kind, {"text_id"}) and name.endswith("_time")
        )

    @cached_property
    def item_category_names(self) -> tuple[str, ...]:
        """Names of the columns of :attr:`ItemFeatures.categorical`."""
        return tuple(
            name
            for view in self._item_views
            for name, kind in view.kinds.items()
            if kind == "string_val"
        )

    def view_of_feature(self, entity: Entity) -> dict[str, str]:
        """Feature of users or items, by its name in the arrays -> the view that it is of."""
        views = self._user_views if entity == "user" else self._item_views
        return {_dense_name(name): view.name for view in views for name in view.kinds}

    def _sequence_fields(self) -> Iterator[str]:
        for scene in self.manifest.scenes:
            for part in ("behavior_ids", "item_keys", "timestamps", "total"):
                yield f"{scene}_{part}"

    def request_times(self, num: int, at: datetime | None = None) -> NDArray[np.int64]:
        """``num`` times the same moment, epoch microseconds; the data set's "now" by default.

        Raises:
            ValueError: If ``at`` has no time zone.
        """
        moment = at or self._clock()
        if moment.tzinfo is None:
            raise ValueError(f"at must have a time zone, got {moment}")
        return np.full(num, micros(moment), dtype=np.int64)

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
        self._live.catch_up()

        def read(keys: NDArray[np.object_], times: NDArray[np.int64]) -> UserFeatures:
            columns = self.views.historical(self._user_views, keys, times, join)
            return self._users(keys, times, columns)

        return self._in_parts(read, user_ids, request_times, join)

    def historical_items(
        self,
        item_ids: Sequence[str] | NDArray[np.object_],
        request_times: NDArray[np.int64],
        *,
        join: Join = "fast",
    ) -> ItemFeatures:
        """Items as they were known at the request times; see :meth:`historical_users`."""

        def read(keys: NDArray[np.object_], times: NDArray[np.int64]) -> ItemFeatures:
            columns = self.views.historical(self._item_views, keys, times, join)
            return self._items(keys, times, columns)

        return self._in_parts(read, item_ids, request_times, join)

    def _in_parts(
        self,
        read: Callable[[NDArray[np.object_], NDArray[np.int64]], Features],
        ids: Sequence[str] | NDArray[np.object_],
        times: NDArray[np.int64],
        join: Join,
    ) -> Features:
        """Read all requests, so many at a time that memory is hardly more than that of the result.

        A part holds neighbouring keys: a row that several requests need is mostly read once.
        """
        keys = np.asarray(ids, dtype=object)
        # Feast's own join reads every row of a view, whatever it is asked: once for all requests.
        if len(keys) <= self._part_requests or len(keys) != len(times) or join == "feast":
            return read(keys, times)
        codes, _ = pd.factorize(keys)
        order = np.argsort(codes, kind="stable")
        starts = range(0, len(order), self._part_requests)
        parts = (order[start : start + self._part_requests] for start in starts)
        return assemble(((part, read(keys[part], times[part])) for part in parts), len(keys))

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
        if self._outputs_view is None:
            return self._users(ids, times, self.views.online(self._user_views, ids, times))
        columns = self.views.online([*self._user_views, self._outputs_view], ids, times)
        outputs = _kept_outputs(columns.pop(self._outputs_view.name))
        return replace(self._users(ids, times, columns), outputs=outputs)

    def online_items(
        self, item_ids: Sequence[str] | NDArray[np.object_], *, at: datetime | None = None
    ) -> ItemFeatures:
        """Items as the online store knows them; see :meth:`online_users`."""
        ids = np.asarray(item_ids, dtype=object)
        times = self.request_times(len(ids), at)
        return self._items(ids, times, self.views.online(self._item_views, ids, times))

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
        self._live.catch_up()
        whole = self._whole(view)
        return self.views.historical([whole], keys, request_times, join)[view]

    def online_columns(
        self, view: str, keys: NDArray[Any], *, at: datetime | None = None
    ) -> Columns:
        """The same as the online store knows it; see :meth:`online_users` for ``at``."""
        times = self.request_times(len(keys), at)
        return self.views.online([self._whole(view)], keys, times)[view]

    def _whole(self, view: str) -> ReadView:
        return self.views.view(view, [f.name for f in self.store.get_feature_view(view).features])

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
            view = self.views.view(name, ["embedding"])
        except FeastObjectNotFoundException as error:
            step = STEPS[unversioned(name)]
            raise MissingStepError(
                f"the feature store does not know {name}: run `longtrail {step}` and `longtrail "
                "apply` first; `longtrail versions` lists what there is"
            ) from error
        times = self.request_times(len(keys), at)
        if source == "offline":
            self._live.catch_up()
            columns = self.views.historical([view], keys, times, "fast")
        else:
            columns = self.views.online([view], keys, times)
        return _matrix(columns[name])

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
            age_names=self.item_age_names,
            moments=_moments(self._item_views, columns, len(ids)),
        )


def _matrix(columns: Columns) -> NDArray[np.float32]:
    """The embeddings of R rows, float32 [R, D]; a row of NaN where there is none."""
    column = columns.values["embedding"]
    assert isinstance(column, Ragged)
    width = int(column.lengths.max(initial=0))
    vectors = np.full((len(column.lengths), width), np.nan, dtype=np.float32)
    vectors[column.lengths > 0] = column.values.reshape(-1, width) if width else 0
    return vectors


def _kept_outputs(columns: Columns) -> KeptOutputs:
    keys, times = (columns.values[name] for name in ("history_key", "computed_time"))
    assert isinstance(keys, np.ndarray)
    assert isinstance(times, np.ndarray)
    return KeptOutputs(_matrix(columns), keys, times)


def _item_keys(ids: NDArray[np.object_]) -> NDArray[np.int64]:
    codes, distinct = pd.factorize(ids)
    keys = np.array([item_key(value) for value in distinct], dtype=np.int64)
    return keys[codes] if len(keys) else np.zeros(0, dtype=np.int64)


def _is_dense(name: str, kind: str, without: set[str]) -> bool:
    return kind in ("int64_val", "float_val", "double_val") and name not in without


def _dense_name(name: str) -> str:
    """A moment (``x_time``) becomes an age in days at the request (``x_age_days``)."""
    return f"{name.removesuffix('_time')}_age_days" if name.endswith("_time") else name


def _dense_names(views: Sequence[ReadView], without: set[str]) -> tuple[str, ...]:
    return tuple(
        _dense_name(name)
        for view in views
        for name, kind in view.kinds.items()
        if _is_dense(name, kind, without)
    )


def _dense(
    views: Sequence[ReadView],
    columns: dict[str, Columns],
    times: NDArray[np.int64],
    without: set[str],
) -> NDArray[np.float32]:
    """float32 [R, F], NaN where missing."""
    parts = []
    for view in views:
        of_view = columns[view.name]
        names = [name for name, kind in view.kinds.items() if _is_dense(name, kind, without)]
        if not names:
            continue
        values = np.stack([np.asarray(of_view.values[name]) for name in names], axis=1)
        values = np.where(of_view.present[:, None], values, np.nan)
        is_time = np.array([name.endswith("_time") for name in names])
        if is_time.any():
            values[:, is_time] = ages_days(values[:, is_time], times)
        parts.append(values.astype(np.float32))
    return np.concatenate(parts, axis=1) if parts else np.zeros((len(times), 0), dtype=np.float32)


def _moments(
    views: Sequence[ReadView], columns: dict[str, Columns], num_rows: int
) -> NDArray[np.float64]:
    """float64 [R, A] of items, NaN where missing; see :attr:`ItemFeatures.moments`."""
    moments = []
    for view in views:
        of_view = columns[view.name]
        for name, kind in view.kinds.items():
            if _is_dense(name, kind, {"text_id"}) and name.endswith("_time"):
                values = of_view.values[name]
                assert isinstance(values, np.ndarray)
                moments.append(np.where(of_view.present, values, np.nan))
    return np.stack(moments, axis=1) if moments else np.zeros((num_rows, 0))
