"""Are the features that requests were answered from those that training will read for them?

Every logged value is compared with what the offline store says of the same key at the same moment,
joined point in time. What differs came late: events, or copies to the online store.

Degraded answers are counted and not compared: they say themselves that something was missing.

Shapes: T = logged items of a request.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date

import numpy as np
from numpy.typing import NDArray

from feature_repo.artifact import load_run_manifest
from feature_repo.columns import Column, Columns, Ragged
from feature_repo.errors import ArtifactError
from feature_repo.features import ItemFeatures, SceneSequence, UserFeatures
from feature_repo.home import Home
from feature_repo.moments import micros
from feature_repo.parity import ViewParity, smallest_hashes
from feature_repo.reader import FeatureReader
from feature_repo.served_files import read_served, request_ids, served_files
from feature_repo.served_rows import ServedRequest, kept, neighbor_hashes
from feature_repo.version_names import Entity
from feature_repo.view_reader import Join

NEIGHBORS_VIEW = "item_neighbors"
_CHUNK_REQUESTS = 50
"""Requests read at once: 10,000 items of 1 KB."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replayed:
    """A logged request and the offline store's features for it.

    Args:
        request: As logged.
        user: The user at the moment of the request.
        items: The T items at the moment that they were read for.
    """

    request: ServedRequest
    user: UserFeatures
    items: ItemFeatures


def sample_ids(home: Home, sample: int, *, since: date | None = None) -> set[str]:
    """Ids of some logged requests: those with the smallest hashes, the same every time.

    Args:
        home: Whose log.
        sample: How many, at least 1.
        since: First day, UTC; None for all.

    Raises:
        MissingStepError: If there is no log.
        NothingToCompareError: If it has nothing of these days.
    """
    files = served_files(home, since=since)
    return set(smallest_hashes((request_ids(file) for file in files), sample))


def requests_of(
    home: Home, wanted: set[str], *, since: date | None = None
) -> Iterator[ServedRequest]:
    """Requests of the log by their ids, oldest day first."""
    for file in served_files(home, since=since):
        yield from read_served(file, wanted)


def replay(
    reader: FeatureReader, requests: Iterable[ServedRequest], *, join: Join
) -> Iterator[Replayed]:
    """Read offline what requests were answered from, some dozens at once.

    Args:
        reader: Of the stores.
        requests: Of the log.
        join: How offline rows are found: by Feast's own join, or by the fast one of training.

    Raises:
        StoreError: If the offline store fails.
    """
    chunk: list[ServedRequest] = []
    for request in requests:
        chunk.append(request)
        if len(chunk) == _CHUNK_REQUESTS:
            yield from _replayed(reader, chunk, join)
            chunk = []
    if chunk:
        yield from _replayed(reader, chunk, join)


@dataclass
class ServedViews:
    """How the features of replayed requests compare, by view.

    Args:
        home: Of the runs, whose vocabularies name the categories.
        reader: Knows which feature is of which view.
        views: The comparison so far; ``online`` in its differences is what was served.
    """

    home: Home
    reader: FeatureReader
    views: dict[str, ViewParity] = field(default_factory=dict)
    _vocabularies: dict[str, dict[str, tuple[str, ...]] | None] = field(default_factory=dict)

    def compare(self, replayed: Replayed) -> None:
        """Add a request that was not degraded."""
        request = replayed.request
        self._compare_user(request, replayed.user)
        self._compare_items(request, replayed.items)

    def _compare_user(self, request: ServedRequest, offline: UserFeatures) -> None:
        values = [_user_values(user) for user in (offline, request.user)]
        # Of a scene or column that the store has no more, nothing is there.
        values[0] |= {name: _absent(values[1][name]) for name in values[1].keys() - values[0]}
        key = f"{request.user.user_ids[0]} (request {request.request_id})"
        for view, names in self._by_view("user", values[1]).items():
            sides = [
                Columns(user.found, {name: side[name] for name in names})
                for user, side in zip((offline, request.user), values, strict=True)
            ]
            self._view(view).compare(np.array([key], dtype=object), *sides)

    def _compare_items(self, request: ServedRequest, offline: ItemFeatures) -> None:
        items = request.items
        served = _columns(items.dense, items.dense_names)
        stored = _columns(offline.dense, offline.dense_names)
        served["text_id"], stored["text_id"] = items.text_ids, offline.text_ids
        for place, name in enumerate(items.category_names):
            indices = self._indices(request.run, name, offline)
            if indices is not None:
                served[name], stored[name] = items.categories[:, place], indices
        stored |= {name: _absent(served[name]) for name in served.keys() - stored}
        keys = [f"{item_id} (request {request.request_id})" for item_id in items.item_ids]
        there = np.ones(len(keys), dtype=bool)
        for view, names in self._by_view("item", served).items():
            self._view(view).compare(
                np.array(keys, dtype=object),
                Columns(offline.found, {name: stored[name] for name in names}),
                Columns(there, {name: served[name] for name in names}),
            )
        hashes = neighbor_hashes(offline.neighbor_keys, offline.neighbor_weights)
        self._view(NEIGHBORS_VIEW).compare(
            np.array(keys, dtype=object),
            Columns(there, {"neighbors": hashes}),
            Columns(there, {"neighbors": items.neighbors}),
        )

    def _indices(self, run: str, name: str, offline: ItemFeatures) -> NDArray[np.int32] | None:
        """Categories as the run's program reads them; None where nobody knows its words."""
        if run not in self._vocabularies:
            try:
                manifest = load_run_manifest(self.home, run)
                self._vocabularies[run] = manifest.category_vocabularies
            except ArtifactError:
                self._vocabularies[run] = None
                _logger.warning("the categories of run %s are not compared: it is gone", run)
        vocabularies = self._vocabularies[run]
        if vocabularies is None:
            return None
        index = {word: place for place, word in enumerate(vocabularies.get(name, ()), start=1)}
        words = offline.categorical.get(name, np.full(len(offline.item_ids), None))
        return np.array([index.get(word, 0) for word in words], dtype=np.int32)

    def _by_view(self, entity: Entity, names: Iterable[str]) -> dict[str, list[str]]:
        """View -> names of its features, as the reader calls them."""
        view_of = self.reader.view_of_feature(entity)
        views: dict[str, list[str]] = {}
        for name in names:
            views.setdefault(view_of.get(name, "(no view has these)"), []).append(name)
        return views

    def _view(self, name: str) -> ViewParity:
        return self.views.setdefault(name, ViewParity())


def _replayed(
    reader: FeatureReader, requests: Sequence[ServedRequest], join: Join
) -> Iterator[Replayed]:
    users = reader.historical_users(
        np.concatenate([request.user.user_ids for request in requests]),
        np.concatenate([request.user.request_times for request in requests]),
        join=join,
    )
    # Most items were shown to many: each is read once for a moment.
    pairs = [(i, micros(r.items_at)) for r in requests for i in r.items.item_ids]
    places = {pair: place for place, pair in enumerate(dict.fromkeys(pairs))}
    items = reader.historical_items(
        np.array([item_id for item_id, _ in places], dtype=object),
        np.array([moment for _, moment in places], dtype=np.int64),
        join=join,
    )
    rows = np.array([places[pair] for pair in pairs], dtype=np.intp)
    start = 0
    for place, request in enumerate(requests):
        end = start + len(request.items.item_ids)
        yield Replayed(
            request, _users_at(users, np.array([place])), _items_at(items, rows[start:end])
        )
        start = end


def _users_at(users: UserFeatures, rows: NDArray[np.intp]) -> UserFeatures:
    return replace(
        users,
        user_ids=users.user_ids[rows],
        request_times=users.request_times[rows],
        found=users.found[rows],
        sequences={
            scene: SceneSequence(
                s.behavior_ids[rows], s.item_keys[rows], s.timestamps[rows], s.total[rows]
            )
            for scene, s in users.sequences.items()
        },
        dense=users.dense[rows],
    )


def _user_values(user: UserFeatures) -> dict[str, Column]:
    """Feature -> its values for the one user, as a view has them."""
    values = _columns(user.dense, user.dense_names)
    for scene, sequence in user.sequences.items():
        parts = ("behavior_ids", "item_keys", "timestamps")
        values |= {f"{scene}_{part}": c for part, c in zip(parts, kept(sequence), strict=True)}
        values[f"{scene}_total"] = sequence.total
    return values


def _columns(dense: NDArray[np.float32], names: Sequence[str]) -> dict[str, Column]:
    return {name: np.ascontiguousarray(dense[:, i]) for i, name in enumerate(names)}


def _absent(column: Column) -> Column:
    """What a store gives that has no such feature: nothing, for as many keys."""
    if isinstance(column, Ragged):
        return Ragged(column.values[:0], np.zeros_like(column.lengths))
    if column.dtype.kind == "f":
        return np.full_like(column, np.nan)
    return np.zeros_like(column)


def _items_at(items: ItemFeatures, rows: NDArray[np.intp]) -> ItemFeatures:
    return replace(
        items,
        item_ids=items.item_ids[rows],
        request_times=items.request_times[rows],
        found=items.found[rows],
        item_keys=items.item_keys[rows],
        text_ids=items.text_ids[rows],
        dense=items.dense[rows],
        categorical={name: column[rows] for name, column in items.categorical.items()},
        neighbor_keys=items.neighbor_keys[rows],
        neighbor_weights=items.neighbor_weights[rows],
        moments=None if items.moments is None else items.moments[rows],
    )
