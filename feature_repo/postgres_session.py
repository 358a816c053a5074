"""Sessions with the PostgreSQL of a profile: settings, errors as sentences, rows as Arrow.

Times are UTC in every session, whatever the server's or the user's setting.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import psycopg
import pyarrow as pa
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres import (
    PostgreSQLOfflineStoreConfig,
)
from psycopg import sql
from psycopg.errors import DiskFull

from feature_repo.database_errors import first_line, outlasting
from feature_repo.errors import StoreError
from feature_repo.postgres_binary import HEADER, TRAILER, arrow_type, decode

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Session = psycopg.Connection[tuple[Any, ...]]

_CONNECT_TIMEOUT_S = 5
PATIENCE_S = 10.0
"""A server that restarts has this long before a reading gives up."""
_DECODE_ROWS = 2048
"""Rows turned into Arrow at once: their bytes are held twice."""


@dataclass(frozen=True)
class TimeLimits:
    """How long a connection waits before it fails."""

    lock_s: float
    """Seconds for a lock, above 0."""
    statement_s: float
    """Seconds of a statement, its waits included, above 0."""
    network_s: float
    """Seconds until what was sent is acknowledged by the server's machine, above 0."""


class Database:
    """The database of a profile's offline store.

    Args:
        config: As Feast reads it from the profile's yaml.
        patience_s: How long a reading waits for a server that went away.
    """

    def __init__(
        self, config: PostgreSQLOfflineStoreConfig, *, patience_s: float = PATIENCE_S
    ) -> None:
        self._patience_s = patience_s
        self._holds = False
        self._held: Session | None = None
        self.schema: str = config.db_schema or config.user
        self.place = f"{config.host}:{config.port}/{config.database}"
        """Host, port and name, for people."""
        options = ("timezone=UTC", f"search_path={self.schema}", "jit=off", "work_mem=64MB")
        self._parameters: dict[str, Any] = {
            "host": config.host,
            "port": config.port,
            "dbname": config.database,
            "user": config.user,
            "password": config.password,
            "sslmode": config.sslmode,
            "sslkey": config.sslkey_path,
            "sslcert": config.sslcert_path,
            "sslrootcert": config.sslrootcert_path,
            "keepalives_idle": config.keepalives_idle,
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "application_name": "longtrail",
            "options": " ".join(f"-c {option}" for option in options),
        }

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A session in which every statement is a transaction of its own, where none is open.

        Raises:
            psycopg.Error: If the server cannot be reached, or as the statements raise.
        """
        connection = self.connect(autocommit=True)
        try:
            yield connection
        finally:
            connection.close()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it, readings of this object share one session: to connect costs 6 ms and more.

        They must come from one thread.
        """
        assert not self._holds, "the session is held already"
        self._holds = True
        try:
            yield
        finally:
            self._holds = False
            self._drop()

    def connect(self, *, autocommit: bool = False, limits: "TimeLimits | None" = None) -> Session:
        """A connection, which the caller closes; see :meth:`session`.

        Args:
            autocommit: Whether a statement is a transaction of its own, where none is open.
            limits: Of its statements; None for none.
        """
        given = {name: value for name, value in self._parameters.items() if value}
        if limits is not None:
            given["options"] += (
                f" -c lock_timeout={round(limits.lock_s * 1000)}"
                f" -c statement_timeout={round(limits.statement_s * 1000)}"
            )
            given["tcp_user_timeout"] = round(limits.network_s * 1000)
        return psycopg.connect(**given, autocommit=autocommit)

    @contextmanager
    def sentences(self, then: str) -> Iterator[None]:
        """Turn the server's errors into a sentence.

        Args:
            then: What to do once the server's trouble is over.

        Raises:
            StoreError: Where the server cannot be reached, or refuses.
        """
        try:
            yield
        except psycopg.Error as error:
            raise StoreError(f"PostgreSQL at {self.place}: {_said(error)}; {then}") from error

    def read(self, work: Callable[[Session], Result]) -> Result:
        """Run a reading in one session, anew where the server went away meanwhile.

        Args:
            work: Reads; it may be called several times.

        Raises:
            StoreError: If the server stays away, or refuses.
        """
        attempts = outlasting(_is_away, patience_s=self._patience_s, tell=self._say_retry)

        def attempt() -> Result:
            if not self._holds:
                with self.session() as session:
                    return work(session)
            if self._held is None:
                self._held = self.connect(autocommit=True)
            try:
                return work(self._held)
            except BaseException:
                self._drop()  # whatever state it is in
                raise

        with self.sentences("check the server and DATABASE_URL, then run this again"):
            return attempts(attempt)

    def _drop(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    def _say_retry(self, error: BaseException | None) -> None:
        logger.warning("PostgreSQL at %s: %s; reading again", self.place, _said(error))


def columns_of(session: Session, table: str) -> dict[str, str]:
    """Column -> PostgreSQL's name of its type, in order; empty where there is no such table."""
    rows = session.execute(
        """
        SELECT attname, format_type(atttypid, NULL) FROM pg_attribute
        WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped ORDER BY attnum
        """,
        [f'"{table}"'],
    ).fetchall()
    return dict(rows)


def read_table(
    session: Session, query: sql.Composable, schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """Stream the rows of a query, in the query's order; memory is that of one batch."""
    rows: list[bytes] = []
    copy_out = sql.SQL("COPY ({}) TO STDOUT (FORMAT binary)").format(query)
    with session.cursor() as cursor, cursor.copy(copy_out) as copy:
        for number, message in enumerate(copy):  # a message holds one row
            row = bytes(message)
            if number == 0:  # the header comes with the first row
                row = row.removeprefix(HEADER)
            if row and row != TRAILER:
                rows.append(row)
            if len(rows) == _DECODE_ROWS:
                yield decode(rows, schema)
                rows = []
    if rows:
        yield decode(rows, schema)


def schema_of(columns: dict[str, str]) -> pa.Schema:
    """Arrow's schema of columns as :func:`columns_of` describes them."""
    return pa.schema([(name, arrow_type(type_name)) for name, type_name in columns.items()])


def _said(error: BaseException | None) -> str:
    """What a server's error says, in one line."""
    said = first_line(error)
    return f"{said} (its disk is full)" if isinstance(error, DiskFull) else said


def _is_away(error: BaseException) -> bool:
    """Whether a server is down, restarts or was lost: 08 and 57P are its codes, or none at all."""
    if not isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return False
    state = error.sqlstate
    return state is None or state.startswith(("08", "57P"))
