"""Where features are written for lookups: one contract for Redis and for SQLite.

The copy to the online store goes through :func:`open_writer` and knows nothing of hashes or tables.
Feast's own writers differ in what they do with older and equal times; here a row replaces what is
stored unless that is newer, so that corrections with an equal time arrive.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Protocol

import pyarrow as pa
from feast import FeatureStore, FeatureView

from feature_repo.errors import StoreError
from feature_repo.online_redis import RedisWriter
from feature_repo.online_sqlite import SqliteWriter


class OnlineWriter(Protocol):
    """Writes the rows of feature views.

    Methods may be called from several threads. Every one raises
    :class:`feature_repo.errors.StoreError` where the store cannot be reached or is full.
    """

    def hold(self, owner: str) -> AbstractContextManager[None]:
        """Hold the only right to copy to this store, across machines.

        Args:
            owner: Who holds it, the same after a kill: the rest of a dead owner is taken over.

        Raises:
            StoreError: If another owner holds it.
        """

    def write(
        self, view: FeatureView, batch: pa.RecordBatch, *, until: datetime | None = None
    ) -> int:
        """Write rows; the number of those that were not older than what is stored.

        Args:
            view: Whose rows.
            batch: Join key, ``event_timestamp``, ``created_timestamp`` and features; a key once.
            until: With it what is stored up to this moment is replaced by older rows too.
        """

    def keys(self, view: FeatureView, batch_keys: int) -> Iterator[pa.Array]:
        """Keys with a row of the view, about ``batch_keys`` at a time; one may come twice."""

    def delete(self, view: FeatureView, keys: pa.Array, *, until: datetime) -> int:
        """Delete the view's rows of some keys, not those later than ``until``; how many."""

    def turn_back(self, view: FeatureView, *, to: datetime, now: Callable[[], datetime]) -> int:
        """Give rows of the future an event time that a whole copy replaces.

        Args:
            view: Whose rows.
            to: Their new event time; the values stay.
            now: The moment behind which the future begins, asked after the rows' times were read:
                what is pushed meanwhile is not of the future.

        Returns:
            The number of rows.
        """

    def clear(self, view: FeatureView) -> None:
        """Delete all rows of the view."""

    def prune(self) -> int:
        """Delete the values of features that no applied view declares any more; how many.

        Values of other projects, and of all views that are applied, stay.
        """

    def count(self, view: FeatureView) -> int:
        """Number of keys with a row of the view."""

    def evicted(self) -> dict[str, int]:
        """Keys that the store threw away by itself: server, as it was started -> how many."""

    def mark(self, view: str, text: str) -> None:
        """Leave a text about a view beside its rows, to be lost where they are lost."""

    def marks(self, view: str) -> set[str]:
        """What :meth:`mark` left, of every server; "" for one that lost it."""


def open_writer(store: FeatureStore) -> OnlineWriter:
    """The online store that a profile's yaml names.

    Raises:
        StoreError: If it is of another type, or cannot be reached.
    """
    kind = store.config.online_store.type
    if kind == "redis":
        return RedisWriter(store)
    if kind == "sqlite":
        return SqliteWriter(store)
    raise StoreError(f"the online store is of type {kind}; expected redis or sqlite")
