"""Where historical features are read: one contract for files and for PostgreSQL.

The reader and the copy to the online store go through :func:`open_offline` and know nothing of
files or tables. A view is named as Feast knows it, so with its version
(:mod:`feature_repo.version_names`).
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from feast import FeatureStore
from numpy.typing import NDArray

from feature_repo.offline_files import OfflineFiles
from feature_repo.offline_postgres import OfflinePostgres


class OfflineStore(Protocol):
    """Reads the rows of applied feature views.

    Every method raises :class:`feature_repo.errors.StoreError` where the store cannot be reached
    or does not know the view.
    """

    def held(self) -> AbstractContextManager[None]:
        """Within it, questions may share what is costly to open; they come from one thread."""

    def latest_rows(
        self,
        view: str,
        *,
        keys: pa.Array,
        times: NDArray[np.int64],
        ttl: timedelta | None,
        columns: Sequence[str],
    ) -> tuple[pa.Table, NDArray[np.int64]]:
        """The rows that Feast's point-in-time join would find for each request.

        For a request (key, time) that is the row of the key with the greatest event time at or
        before the request's time, of these the one created last, unless it is older than ``ttl``.

        Args:
            view: Name of the view.
            keys: R keys, string or int64 as the view's join key.
            times: int64 [R]; epoch microseconds, UTC.
            ttl: The view's time to live; None or 0 for ever.
            columns: Columns to read.

        Returns:
            The distinct rows found, and int64 [R]: for each request the number of its row there,
            -1 where none.
        """

    def newest_rows(
        self, view: str, *, start: datetime, end: datetime, batch_rows: int
    ) -> tuple[int, Iterator[pa.RecordBatch]]:
        """Each key's newest row of a range of event times, with memory for a few batches.

        Args:
            view: Name of the view.
            start: Oldest event time.
            end: Newest event time.
            batch_rows: Most rows of a batch.

        Returns:
            The number of keys, and their rows in batches: join key, both timestamps, features.
        """

    def parts(self, view: str) -> dict[str, list[int]]:
        """What a batch wrote: name of a part -> numbers that change when the part changes.

        Empty where the view has no such rows; those of live events are no part.
        """

    def first_event(self, view: str, parts: Collection[str]) -> datetime:
        """Oldest event time in some parts, at least one; UTC."""

    def ask(self, view: str, question: str) -> tuple[Any, ...]:
        """The first row of a query over the rows of a view.

        Args:
            view: Name of the view.
            question: SQL that DuckDB and PostgreSQL both understand, with ``{rows}`` and ``{key}``
                for the view's rows and its join key.
        """

    def require(self, view: str) -> None:
        """Make sure that the view was built.

        Raises:
            MissingStepError: If not; it names the step to run.
        """


def open_offline(store: FeatureStore) -> OfflineStore:
    """The offline store that a profile's yaml names."""
    if store.config.offline_store.type == "postgres":
        return OfflinePostgres(store)
    return OfflineFiles(store)


def time_literal(moment: datetime) -> str:
    """A moment in the SQL of :meth:`OfflineStore.ask`."""
    return f"TIMESTAMPTZ '{moment.isoformat()}'"
