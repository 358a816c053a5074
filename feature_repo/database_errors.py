"""Trouble with a database server, told from defects, whatever library says it.

Feast's registry speaks through SQLAlchemy and shows its errors as they are; our own sessions
(:mod:`feature_repo.postgres_session`) have sentences of their own.
"""

import sqlite3
from collections.abc import Callable

import psycopg
from psycopg.errors import InsufficientPrivilege
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_delay,
    wait_exponential,
)

_OF_SQLALCHEMY = (OperationalError, InterfaceError, InternalError, PoolTimeout)
_OF_PSYCOPG = (
    psycopg.OperationalError,
    psycopg.InterfaceError,
    psycopg.InternalError,
    InsufficientPrivilege,
)


def database_trouble(error: BaseException) -> str | None:
    """A sentence where an error comes from a database that is away, busy, or refuses.

    A statement that is wrong in itself is a defect, and keeps its traceback.

    Returns:
        What is wrong and what to do, without any secret; None where it is something else.
    """
    cause: BaseException | None = error
    while cause is not None:
        if _is_trouble(cause):
            original = cause.orig if isinstance(cause, DBAPIError) else cause
            name = "SQLite" if isinstance(original, sqlite3.Error) else "PostgreSQL"
            suspects = (
                "who else uses the file" if name == "SQLite" else "the server and DATABASE_URL"
            )
            return (
                f"{name} does not answer as it should ({first_line(original)}): check {suspects}, "
                "then run this again; what was finished before is kept"
            )
        cause = cause.__cause__
    return None


def outlasting(
    is_away: Callable[[BaseException], bool],
    *,
    patience_s: float,
    tell: Callable[[BaseException | None], None],
) -> Retrying:
    """What calls a function again while a server restarts; the last error is raised as it is.

    Args:
        is_away: Whether an error says that the server went away.
        patience_s: How long it has.
        tell: Told each error that is outlasted.
    """

    def before(state: RetryCallState) -> None:
        tell(state.outcome.exception() if state.outcome else None)

    return Retrying(
        retry=retry_if_exception(is_away),
        stop=stop_after_delay(patience_s),
        wait=wait_exponential(multiplier=0.1, max=1),
        before_sleep=before,
        reraise=True,
    )


def first_line(error: BaseException | None) -> str:
    """What a database says, in one line; no line of any holds a password."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _is_trouble(error: BaseException) -> bool:
    if isinstance(error, DBAPIError):
        refused = getattr(error.orig, "pgcode", None) == InsufficientPrivilege.sqlstate
        # A server that dies in the middle of an answer is no OperationalError with psycopg2.
        return isinstance(error, _OF_SQLALCHEMY) or error.connection_invalidated or refused
    return isinstance(error, (PoolTimeout, *_OF_PSYCOPG))
