"""Users and items of the data set by name: what a person searches among, on the page.

Rankings need none of it, so it is read when it is first asked for, and again after an ingest.
"""

import logging
import threading
from dataclasses import dataclass
from typing import Protocol

import duckdb
import numpy as np
from numpy.typing import NDArray

from feature_repo.catalog import Catalog
from feature_repo.errors import LongtrailError, MissingStepError
from feature_repo.home import Home
from feature_repo.push import read_tables
from feature_repo.query_engine import query_engine

_log = logging.getLogger(__name__)


class Directory(Protocol):
    """Users and items by name."""

    def users(self, prefix: str, limit: int) -> list[str]:
        """User ids that begin with ``prefix``; those with the most behaviours first."""

    def items(self, query: str, limit: int) -> list[tuple[str, str]]:
        """Ids and titles of items that fit ``query``, the best first."""

    def title(self, item_id: str) -> str | None:
        """Latest title of an item; None for an unknown item."""


@dataclass(frozen=True)
class NameTable:
    """A directory in memory.

    Args:
        user_ids: str objects [U], ascending.
        num_behaviors: int64 [U].
        titles: Item id -> latest title, empty where there is none; by id.
    """

    user_ids: NDArray[np.object_]
    num_behaviors: NDArray[np.int64]
    titles: dict[str, str]

    @classmethod
    def of(cls, num_behaviors: dict[str, int], catalog: Catalog) -> "NameTable":
        """Build the table from users with their numbers of behaviours, and the catalogue."""
        user_ids = sorted(num_behaviors)
        return cls(
            user_ids=np.array(user_ids, dtype=object),
            num_behaviors=np.array([num_behaviors[one] for one in user_ids], dtype=np.int64),
            titles={str(one): catalog.title(one) or "" for one in catalog.item_ids},
        )

    def users(self, prefix: str, limit: int) -> list[str]:
        """See :class:`Directory`; of equal numbers of behaviours, the smaller id first."""
        start = self.user_ids.searchsorted(prefix)
        # No id that begins with the prefix is above the prefix and the last character there is.
        end = self.user_ids.searchsorted(prefix + "\U0010ffff", side="right")
        most = np.argsort(-self.num_behaviors[start:end], kind="stable")[:limit]
        return [str(user_id) for user_id in self.user_ids[start:end][most]]

    def items(self, query: str, limit: int) -> list[tuple[str, str]]:
        """See :class:`Directory`.

        An item fits if its id begins with the query, or its title has all words of it. Best is what
        begins with the query, then the shorter title. Cost: one look at every title.
        """
        wanted = query.casefold().strip()
        words = wanted.split()
        found = []
        for item_id, title in self.titles.items():
            folded = title.casefold()
            by_id = item_id.casefold().startswith(wanted)
            if by_id or all(word in folded for word in words):
                begins = by_id or folded.startswith(wanted)
                found.append((not begins, len(title), item_id, title))
        found.sort()
        return [(item_id, title) for _, _, item_id, title in found[:limit]]

    def title(self, item_id: str) -> str | None:
        """See :class:`Directory`."""
        return self.titles.get(item_id)


class HomeDirectory:
    """The directory of a home's data set, safe for threads.

    After an ingest one thread reads the new one; meanwhile the others answer from the old one.

    Args:
        home: Whose; the methods raise :class:`MissingStepError` before the first ingest.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self._lock = threading.Lock()
        self._read_at: int | None = None
        self._table: NameTable | None = None

    def users(self, prefix: str, limit: int) -> list[str]:
        """See :class:`Directory`."""
        return self._now().users(prefix, limit)

    def items(self, query: str, limit: int) -> list[tuple[str, str]]:
        """See :class:`Directory`."""
        return self._now().items(query, limit)

    def title(self, item_id: str) -> str | None:
        """See :class:`Directory`."""
        return self._now().title(item_id)

    def _now(self) -> NameTable:
        table = self._table
        if table is not None and self._stamp() in (None, self._read_at):
            return table
        # Whoever has an old table does not wait for a new one.
        if not self._lock.acquire(blocking=table is None):
            assert table is not None
            return table
        try:
            if self._table is None or self._stamp() != self._read_at:
                self._load()
        except LongtrailError as error:
            if self._table is None:
                raise
            _log.warning("names of users and items stay those of the last ingest: %s", error)
        finally:
            self._lock.release()
        assert self._table is not None
        return self._table

    def _stamp(self) -> int | None:
        """When the last ingest ended, in ns; None where there was none, or one is at its end."""
        try:
            return self._home.manifest.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _load(self) -> None:
        """Read the tables.

        Raises:
            MissingStepError: If there are none.
        """

        def read() -> tuple[int | None, NameTable]:
            stamp = self._stamp()  # before the tables: what comes meanwhile is read next time
            catalog = Catalog.load(self._home)
            return stamp, NameTable.of(self._counts(), catalog)

        try:
            self._read_at, self._table = read_tables(read)
        except FileNotFoundError as error:
            raise MissingStepError(
                f"{self._home.tables} lacks {error.filename or 'files'}: run `longtrail ingest` "
                "again"
            ) from error

    def _counts(self) -> dict[str, int]:
        """Behaviours of each user, from the canonical events."""
        with query_engine() as connection:
            try:
                rows = connection.execute(
                    "SELECT user_id, count(*) FROM read_parquet(?) GROUP BY user_id",
                    [str(self._home.events / "*.parquet")],
                ).fetchall()
            except duckdb.IOException as error:  # an ingest has just replaced them
                raise FileNotFoundError(str(error)) from error
        return {str(user_id): int(count) for user_id, count in rows}
