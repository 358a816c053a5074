"""The journal of live events: an event is in it, durably, before anybody is told that it was taken.

It is a table ``live_events``: in SQLite in the home for the profile over files, else in the
profile's PostgreSQL. Nothing is ever deleted, so it says which events have been accepted; what the
stores hold of a user is a function of the *set* of its events, those of the tables and those of the
journal. Applying an event twice, or after a kill, changes nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import sqlalchemy as sa
from filelock import FileLock, Timeout
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from feature_repo.behavior import hash63
from feature_repo.errors import StoreError
from feature_repo.home import Home
from feature_repo.live_rows import EVENTS, METADATA, JournalEvent, Turn, chunks
from feature_repo.publish import FILES_PROFILE

if TYPE_CHECKING:
    from feast import FeatureStore

_TURN_TIMEOUT_S = 30.0
"""Of another process's turn: it may wait for Redis twice."""
_STATEMENT_TIMEOUT_S = 60.0
"""A statement may wait for a lock as well; each touches a few hundred rows."""
_NETWORK_TIMEOUT_S = 10.0
_LOCK_NOT_AVAILABLE = "55P03"
"""PostgreSQL's code of a lock that was waited for too long."""
_POLL_S = 0.002
_INSERT_LOCK, _USER_LOCKS = 7_201_001, 7_201_002
"""Names of PostgreSQL's advisory locks here, among those of a database; any numbers do."""
_HELD = (
    "another process has been applying live events for too long; is it stopped? End it, then send "
    "the events again: each is taken once"
)
_TIME = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True)
class LiveSource:
    """Live events as a source of ingest.

    Args:
        events: user_id, event_timestamp, scene, text, item_id, in the order of acceptance.
        sequence: Of the last one; 0 where there is none.
    """

    events: pa.Table
    sequence: int


class EventJournal:
    """The journal of one data set in one profile's database; safe for threads and processes.

    Every method raises :class:`feature_repo.errors.StoreError` where the database does not answer.

    Args:
        engine: Of the database.
        dataset: Name of the data set.
        place: The database, for people.
        lock: File that stands for the right to apply, where the database has no such locks.
        turn_timeout_s: Seconds to wait for that file, above 0.
    """

    def __init__(
        self,
        engine: sa.Engine,
        dataset: str,
        place: str,
        lock: str | None,
        turn_timeout_s: float = _TURN_TIMEOUT_S,
    ) -> None:
        self._engine = engine
        self._turn_timeout_s = turn_timeout_s
        self.dataset = dataset
        self._place = place
        self._lock = lock
        self._mine = EVENTS.c.dataset == dataset

    @classmethod
    def open(cls, home: Home, profile: str, dataset: str) -> "EventJournal":
        """Open the journal of a profile; its table is made where it is missing.

        Raises:
            StoreError: If the database cannot be reached.
        """
        journal = cls.connect(home, profile, dataset)
        home.root.mkdir(parents=True, exist_ok=True)
        with journal._begin() as connection:
            if journal._lock is None:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_INSERT_LOCK)))
            METADATA.create_all(connection)
        return journal

    @classmethod
    def find(cls, home: Home, profile: str, dataset: str) -> "EventJournal | None":
        """The journal of a profile; None where no live event was ever taken."""
        journal = cls.connect(home, profile, dataset)
        return journal if journal.exists() else None

    @classmethod
    def connect(
        cls,
        home: Home,
        profile: str,
        dataset: str,
        store: "FeatureStore | None" = None,
        *,
        turn_timeout_s: float = _TURN_TIMEOUT_S,
    ) -> "EventJournal":
        """The journal of a profile, whether there is one or not; nothing is asked yet.

        Args:
            home: Whose.
            profile: In which database.
            dataset: Name of the data set.
            store: Feast's store of the profile, where it is open.
            turn_timeout_s: Seconds to wait for another process's turn, above 0.
        """
        if profile == FILES_PROFILE:
            engine = sa.create_engine(
                f"sqlite:///{home.live_events}", connect_args={"timeout": _TURN_TIMEOUT_S}
            )
            sa.event.listen(engine, "connect", _durable)
            place = str(home.live_events)
            return cls(engine, dataset, place, f"{place}.lock", turn_timeout_s)
        # Feast takes seconds to import: a profile over files does not wait for it.
        from feature_repo.postgres_session import Database, TimeLimits
        from feature_repo.profiles import open_store

        database = Database((store or open_store(home, profile)).config.offline_store)
        limits = TimeLimits(turn_timeout_s, _STATEMENT_TIMEOUT_S, _NETWORK_TIMEOUT_S)
        engine = sa.create_engine(
            "postgresql+psycopg://",
            creator=partial(database.connect, limits=limits),
            pool_pre_ping=True,
        )
        return cls(engine, dataset, f"PostgreSQL at {database.place}", None)

    def exists(self) -> bool:
        """Whether a live event was ever taken, of any data set."""
        file = self._engine.url.database if self._lock is not None else None
        if file is not None and not Path(file).exists():  # asking would make it
            return False
        with self._begin() as connection:
            return sa.inspect(connection).has_table(EVENTS.name)

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    def add(self, events: Sequence[JournalEvent]) -> set[str]:
        """Take events, durably: all that are new, or none where it fails.

        Returns:
            The ids of those that are new.
        """
        new: set[str] = set()
        # One transaction after the other: the sequence is the order in which they can be seen.
        with self._begin() as connection:
            if self._lock is None:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_INSERT_LOCK)))
            for chunk in chunks(events):
                rows = [
                    {"dataset": self.dataset, "applied": False, **vars(event)} for event in chunk
                ]
                insert = postgresql.insert if self._lock is None else sqlite.insert
                statement = insert(EVENTS).values(rows).on_conflict_do_nothing()
                new |= set(connection.scalars(statement.returning(EVENTS.c.event_id)))
        return new

    def pending_users(self, event_ids: Sequence[str] | None = None) -> list[str]:
        """Users with events that are not applied yet, sorted.

        Args:
            event_ids: Only of these events; None for all.
        """
        users = sa.select(EVENTS.c.user_id).where(self._mine, ~EVENTS.c.applied).distinct()
        chosen = (
            [users]
            if event_ids is None
            else [users.where(EVENTS.c.event_id.in_(part)) for part in chunks(event_ids)]
        )
        with self._begin() as connection:
            found = [connection.scalars(query).all() for query in chosen]
        return sorted({user for part in found for user in part})

    @contextmanager
    def turn(self, user_ids: Sequence[str]) -> Iterator["Turn"]:
        """Hold the only right to apply events of some users, across processes.

        What :class:`Turn` marks counts when the block ends without an error.

        Args:
            user_ids: At most a few hundred.

        Raises:
            StoreError: If another process holds it for too long.
        """
        with self._only(), self._begin() as connection:
            if self._lock is None:
                # In one order everywhere, so that nobody waits in a circle.
                for key in sorted({hash63(user) & 0x7FFFFFFF for user in user_ids}):
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_USER_LOCKS, key)))
            yield Turn(connection, self._mine, list(user_ids))

    @contextmanager
    def _only(self) -> Iterator[None]:
        """SQLite takes one writer at a time anyway; PostgreSQL locks each user."""
        if self._lock is None:
            yield
            return
        lock = FileLock(self._lock, timeout=self._turn_timeout_s, poll_interval=_POLL_S)
        try:
            lock.acquire()
        except Timeout as error:
            raise StoreError(_HELD) from error
        try:
            yield
        finally:
            lock.release()

    def last_sequence(self) -> int:
        """Number of the last event; 0 where there is none."""
        with self._begin() as connection:
            newest = sa.select(sa.func.max(EVENTS.c.sequence)).where(self._mine)
            return int(connection.scalar(newest) or 0)

    def users_since(self, sequence: int) -> list[str]:
        """Users with events behind the one of that number, sorted."""
        query = sa.select(EVENTS.c.user_id).where(self._mine, EVENTS.c.sequence > sequence)
        with self._begin() as connection:
            return sorted(connection.scalars(query.distinct()).all())

    def newest_users(self, num_events: int) -> list[str]:
        """Users of so many events that were taken last, sorted."""
        newest = (
            sa.select(EVENTS.c.user_id)
            .where(self._mine)
            .order_by(EVENTS.c.sequence.desc())
            .limit(num_events)
            .subquery()
        )
        with self._begin() as connection:
            return sorted(connection.scalars(sa.select(newest.c.user_id).distinct()).all())

    def source(self) -> LiveSource:
        """All events, for ingest."""
        columns = ("sequence", "user_id", "time", "scene", "text", "item_id")
        query = sa.select(*(EVENTS.c[name] for name in columns)).where(self._mine)
        with self._begin() as connection:
            if self._lock is None:  # nobody waits for it, and it may be long
                connection.execute(sa.text("SET LOCAL statement_timeout = 0"))
            rows = connection.execute(query.order_by(EVENTS.c.sequence)).all()
        values = dict(zip(columns, zip(*rows, strict=True), strict=True)) if rows else {}
        table = pa.table(
            {
                "user_id": pa.array(values.get("user_id", ()), pa.string()),
                "event_timestamp": pa.array(values.get("time", ()), pa.int64()).cast(_TIME),
                "scene": pa.array(values.get("scene", ()), pa.string()),
                "text": pa.array(values.get("text", ()), pa.string()),
                "item_id": pa.array(values.get("item_id", ()), pa.string()),
            }
        )
        return LiveSource(table, int(rows[-1].sequence) if rows else 0)

    def events(self, user_ids: Sequence[str], *, after: int = 0) -> list[JournalEvent]:
        """Events of some users behind the one of a number, applied or not."""
        with self._begin() as connection:
            return Turn(connection, self._mine, list(user_ids)).events(after=after)

    @contextmanager
    def _begin(self) -> Iterator[sa.Connection]:
        """A transaction; a database's errors become a sentence."""
        try:
            with self._engine.begin() as connection:
                yield connection
        except (DBAPIError, PoolTimeout) as error:
            reason = error.orig if isinstance(error, DBAPIError) else error
            if getattr(reason, "sqlstate", None) == _LOCK_NOT_AVAILABLE:
                raise StoreError(_HELD) from error
            said = str(reason).strip().splitlines() or [type(reason).__name__]
            raise StoreError(
                f"the journal of live events, {self._place}, does not answer as it should "
                f"({said[0]}); check it, then send the events again: each is taken once"
            ) from error


def live_source(home: Home, profile: str, dataset: str) -> LiveSource | None:
    """The live events of a data set as a source of ingest; None where there is none."""
    journal = EventJournal.find(home, profile, dataset)
    if journal is None:
        return None
    try:
        source = journal.source()
    finally:
        journal.close()
    return source if source.sequence else None


def _durable(connection: Any, _record: Any) -> None:
    """Readers and the writer do not wait for each other; a commit is on the disk."""
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
