"""DuckDB, as whoever asks the home's files something wants it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import duckdb


@contextmanager
def query_engine(config: Mapping[str, Any] | None = None) -> Iterator[Any]:
    """Open an engine of its own, in memory, with times in UTC; it is closed with the block.

    Args:
        config: DuckDB's own options by name; None = its defaults.
    """
    with duckdb.connect(config=dict(config or {})) as connection:
        connection.execute("SET enable_progress_bar = false")  # it would go to stdout
        connection.execute("SET TimeZone = 'UTC'")
        yield connection
