"""Features into Feast's SQLite tables: the embedded profile, one machine, one process at a time."""

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
from feast import FeatureStore, FeatureView
from feast.infra.online_stores.helpers import compute_table_id
from feast.types import String
from feast.utils import _convert_arrow_to_proto

from feature_repo.command import full_disk
from feature_repo.errors import StoreError
from feature_repo.feast_bytes import KeyCodec


@contextmanager
def sqlite_errors() -> Iterator[None]:
    """Turn SQLite's errors into a sentence, but for a full disk, which has one of its own.

    Raises:
        StoreError: In place of them.
    """
    try:
        yield
    except sqlite3.Error as error:
        if full_disk(error):
            raise
        if "no such table" in str(error):
            raise StoreError(
                "the online store in SQLite lacks a view's table: run `longtrail apply` and "
                "`longtrail materialize`"
            ) from error
        raise StoreError(
            f"the online store in SQLite does not answer as it should ({error}); is another "
            "process holding it? Then run this again"
        ) from error


class SqliteWriter:
    """The contract of :class:`feature_repo.online.OnlineWriter` over Feast's own SQLite store.

    Feast keeps event times in whole seconds here, so two rows of one second count as equal.

    Args:
        store: Feast's store.
    """

    def __init__(self, store: FeatureStore) -> None:
        self._store = store
        self._online = store._get_provider().online_store
        with sqlite_errors():
            self._connection: Any = self._online._get_conn(store.config)
        self._lock = threading.Lock()
        self._ready: set[str] = set()
        with self._turn():
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS longtrail_marks (view TEXT PRIMARY KEY, mark TEXT)"
            )

    @contextmanager
    def hold(self, owner: str) -> Iterator[None]:  # noqa: ARG002
        """Nothing: the file lies in the home, which the owner holds."""
        yield

    def write(
        self, view: FeatureView, batch: pa.RecordBatch, *, until: datetime | None = None
    ) -> int:
        """Write rows through Feast, but not where something newer is stored."""
        join_keys = {c.name: c.dtype.to_value_type() for c in view.entity_columns}
        rows = _convert_arrow_to_proto(batch, view, join_keys)
        moments = [moment.replace(tzinfo=UTC) for _, _, moment, _ in rows]
        limits = [max(moment, until or moment) for moment in moments]
        # One writer at a time from here on, other processes included: what is compared is replaced.
        with self._turn():
            self._create(view)
            self._connection.execute("BEGIN IMMEDIATE")
            stored = self._online.online_read(self._store.config, view, [row[0] for row in rows])
            kept = [
                row
                for row, limit, (moment, _) in zip(rows, limits, stored, strict=True)
                if moment is None or moment <= limit
            ]
            self._online.online_write_batch(self._store.config, view, kept, None)
        return len(kept)

    def keys(self, view: FeatureView, batch_keys: int) -> Iterator[pa.Array]:
        """All keys of the view's table."""
        codec = self._codec(view)
        with self._turn():
            self._create(view)
            found = self._connection.execute(f"SELECT DISTINCT entity_key FROM {self._table(view)}")  # noqa: S608
            keys = [key for (key,) in found]
        for start in range(0, len(keys), batch_keys):
            yield codec.decode(keys[start : start + batch_keys])

    def delete(self, view: FeatureView, keys: pa.Array, *, until: datetime) -> int:
        """Delete the rows of some keys in one transaction."""
        encoded = self._codec(view).encode(keys.to_pylist())
        limit = until.astimezone(UTC).replace(tzinfo=None)
        with self._turn():
            done = self._connection.executemany(
                f"DELETE FROM {self._table(view)} WHERE entity_key = ? AND event_ts <= ?",  # noqa: S608
                [(key, limit) for key in encoded],
            )
        return int(done.rowcount) // len(view.features)

    def turn_back(self, view: FeatureView, *, to: datetime, now: Callable[[], datetime]) -> int:
        """Change the event times in one statement."""
        moments = [moment.astimezone(UTC).replace(tzinfo=None) for moment in (to, now())]
        with self._turn():
            self._create(view)
            done = self._connection.execute(
                f"UPDATE {self._table(view)} SET event_ts = ? WHERE event_ts > ?",  # noqa: S608
                moments,
            )
        return int(done.rowcount) // len(view.features)

    def clear(self, view: FeatureView) -> None:
        """Empty the view's table."""
        with self._turn():
            self._create(view)
            self._connection.execute(f"DELETE FROM {self._table(view)}")  # noqa: S608

    def prune(self) -> int:
        """Delete what the tables of applied views hold of other features; Feast drops the rest."""
        num_removed = 0
        for view in self._store.list_feature_views():
            names = [feature.name for feature in view.features]
            with self._turn():
                self._create(view)
                done = self._connection.execute(
                    f"DELETE FROM {self._table(view)} "  # noqa: S608
                    f"WHERE feature_name NOT IN ({', '.join('?' * len(names))})",
                    names,
                )
            num_removed += int(done.rowcount)
        return num_removed

    def count(self, view: FeatureView) -> int:
        """Number of keys in the view's table."""
        with self._turn():
            self._create(view)
            ((number,),) = self._connection.execute(
                f"SELECT count(DISTINCT entity_key) FROM {self._table(view)}"  # noqa: S608
            )
        return int(number)

    def evicted(self) -> dict[str, int]:
        """Nothing: a file keeps what it holds."""
        return {}

    def mark(self, view: str, text: str) -> None:
        """Write the text into a table beside Feast's."""
        with self._turn():
            self._connection.execute(
                "INSERT OR REPLACE INTO longtrail_marks VALUES (?, ?)", (view, text)
            )

    def marks(self, view: str) -> set[str]:
        """What the table beside Feast's holds."""
        with self._turn():
            rows = self._connection.execute(
                "SELECT mark FROM longtrail_marks WHERE view = ?", (view,)
            ).fetchall()
        return {text for (text,) in rows} or {""}

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One thread at a time, in a transaction; errors as sentences."""
        with self._lock, sqlite_errors(), self._connection:
            yield

    def _create(self, view: FeatureView) -> None:
        """Feast's apply makes the table; the file may have been deleted since."""
        if view.name not in self._ready:
            self._online.update(self._store.config, [], [view], [], [], partial=True)
            self._ready.add(view.name)

    def _table(self, view: FeatureView) -> str:
        versions = self._store.config.registry.enable_online_feature_view_versioning
        return f'"{compute_table_id(self._store.project, view, versions)}"'

    def _codec(self, view: FeatureView) -> KeyCodec:
        (key,) = view.entity_columns
        return KeyCodec(key.name, "", is_string=key.dtype == String)
