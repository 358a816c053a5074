"""Open Feast's registry; where it is in PostgreSQL, outlast a restart of the server.

Only connecting is tried again: nothing was asked yet, so a change is never made twice.
"""

import logging
from typing import Any

from feast import FeatureStore
from sqlalchemy import Engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, OperationalError

from feature_repo.connections import DATABASE_URL
from feature_repo.database_errors import first_line, outlasting
from feature_repo.errors import StoreAwayError, StoreError
from feature_repo.postgres_session import PATIENCE_S

logger = logging.getLogger(__name__)


def open_registry(store: FeatureStore, profile: str, *, patience_s: float = PATIENCE_S) -> None:
    """Connect a store to its registry, which Feast would do with the first question.

    Args:
        store: Feast's store.
        profile: Its name, for people.
        patience_s: How long each later connection waits for a server that went away.

    Raises:
        StoreError: If it cannot be used; a :class:`StoreAwayError` where it may answer later.
    """
    try:
        registry: Any = store.registry
    except DBAPIError as error:
        url = make_url(store.config.registry.path)
        place = f"{url.host}:{url.port}" if url.host else url.database
        suspects = f"the server and {DATABASE_URL}" if url.host else "the file"
        is_away = isinstance(error, OperationalError)  # else no tables can be made
        raise (StoreAwayError if is_away else StoreError)(
            f"the registry of the profile {profile!r} at {place} cannot be "
            f"{'reached' if is_away else 'used'} ({first_line(error.orig)}): "
            f"check {suspects}; see docs/production.md; nothing is lost"
        ) from error
    for engine in {registry.read_engine, registry.write_engine}:
        if engine.dialect.name == "postgresql":
            _keep_connecting(engine, patience_s)


def _keep_connecting(engine: Engine, patience_s: float) -> None:
    """Let an engine try a connection again; its pool replaces those that broke."""
    away = engine.dialect.loaded_dbapi.OperationalError
    attempts = outlasting(
        lambda error: isinstance(error, away), patience_s=patience_s, tell=_say_retry
    )

    @event.listens_for(engine, "do_connect")
    def connect(dialect: Any, _record: Any, words: Any, names: Any) -> Any:
        return attempts(dialect.connect, *words, **names)


def _say_retry(error: BaseException | None) -> None:
    logger.warning("the registry's PostgreSQL: %s; connecting again", first_line(error))
