"""Served requests and clicks become labelled impressions, to train the next model on.

A click names the request that it answers and the item. What a request returned and logged becomes
its impressions, all of them of the moment that its features were read for; so training reads what
serving read, point in time.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb

from feature_repo.dataset import LoadedDataSet
from feature_repo.errors import DataSetError, StoreError
from feature_repo.home import Home, complete_file
from feature_repo.query_engine import query_engine
from feature_repo.served_files import served_files

VALID_SHARE = TEST_SHARE = 0.1
"""Parts of the impressions, the newest ones, for the splits valid and test."""
_READERS = {
    # A number-like id keeps its leading zeros only as text.
    ".csv": "FROM read_csv({file}, all_varchar = true)",
    ".parquet": "FROM read_parquet({file})",
    ".json": "FROM read_json({file})",
    ".jsonl": "FROM read_json({file})",
}
_COLUMNS = ("request_id", "user_id", "item_id", "user_at AS event_timestamp", "clicked")
_REQUESTS = """
CREATE TABLE requests AS
SELECT request_id, user_id, user_at, served_at, context_names, context_values,
    item_ids[1:num_returned] AS shown,
    row_number() OVER (PARTITION BY request_id ORDER BY served_at DESC, user_id) = 1 AS is_latest,
    served_at <= ? AS is_over
FROM read_parquet(?, hive_partitioning = false)
"""
_CLICKS = """
CREATE TABLE clicks AS
SELECT earliest.*, coalesce(NOT list_contains(shown, item_id), true) AS is_unmatched,
    coalesce(time > served_at + ?, false) AS is_late
FROM (
    SELECT request_id::VARCHAR AS request_id, item_id::VARCHAR AS item_id,
        min(event_timestamp::TIMESTAMPTZ) AS time
    FROM given GROUP BY ALL
) earliest LEFT JOIN (SELECT * FROM requests WHERE is_latest) USING (request_id)
"""
_IMPRESSIONS = """
CREATE TABLE impressions AS
SELECT request_id, user_id, item_id, place, user_at, context_names, context_values,
    (request_id, item_id) IN (
        SELECT (request_id, item_id) FROM clicks WHERE NOT is_late AND NOT is_unmatched
    )::TINYINT AS clicked
FROM (
    SELECT *, unnest(shown) AS item_id, unnest(range(len(shown))) AS place
    FROM requests WHERE is_latest AND is_over
)
"""


@dataclass(frozen=True)
class JoinedClicks:
    """What became of served requests and clicks.

    Args:
        requests: Requests whose impressions were written.
        open_requests: Requests left out, because their window is not over yet.
        repeated_requests: Rows left out, because a later answer has the same request id.
        impressions: Rows written.
        clicked: Those that were clicked.
        clicks: Distinct clicks that were given.
        late_clicks: Of them, clicks that came after their request's window.
        unmatched_clicks: Of them, clicks on what no logged request returned.
    """

    requests: int
    open_requests: int
    repeated_requests: int
    impressions: int
    clicked: int
    clicks: int
    late_clicks: int
    unmatched_clicks: int


def clicks_query(file: Path) -> str:
    """The query that reads a file of clicks.

    Raises:
        DataSetError: If there is no such file, or of no known kind.
    """
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise DataSetError(f"the file of clicks {file} must end in one of {', '.join(_READERS)}")
    if not file.is_file():
        raise DataSetError(f"the file of clicks {file} does not exist")
    return reader.format(file=_quoted(str(file)))


def join_clicks(
    home: Home,
    query: str,
    out: Path,
    *,
    window: timedelta,
    now: datetime,
    since: date | None = None,
) -> JoinedClicks:
    """Write the impressions of served requests, with whether they were clicked.

    Args:
        home: Whose log.
        query: Gives the clicks, in DuckDB's dialect: request_id, item_id and, if known,
            event_timestamp; without it every click is in time.
        out: The parquet file; columns as :mod:`training.impressions` reads them, and one for each
            context value that requests told.
        window: A click counts if it came at most so long after its request was answered.
        now: Requests whose window ends later are left out: they may still be clicked.
        since: First day of the log, UTC; None for all.

    Raises:
        MissingStepError: If nothing was logged.
        NothingToCompareError: If nothing was logged since the first day.
        StoreError: If the log cannot be read.
        DataSetError: If the query fails, lacks a column, or no request is old enough.
    """
    files = [str(file) for file in served_files(home, since=since)]
    with query_engine({"memory_limit": "2GB"}) as connection:
        try:
            connection.execute(_REQUESTS, [now - window, files])
        except duckdb.Error as error:
            raise StoreError(
                f"the log of served requests cannot be read ({str(error).splitlines()[0]}): move "
                "the file that it names away, then run this again"
            ) from error
        _load_clicks(connection, query, window)
        num_rows, num_open, num_latest = _one(
            connection,
            "SELECT count(*), count(*) FILTER (is_latest AND NOT is_over), "
            "count(*) FILTER (is_latest) FROM requests",
        )
        if num_latest == num_open:
            raise DataSetError(
                f"none of the {num_latest:,} served requests is older than the window of {window}; "
                "wait, or give a shorter one with --window-hours"
            )
        contexts = [
            name
            for (name,) in connection.execute(
                "SELECT DISTINCT unnest(context_names) AS name FROM requests WHERE is_over "
                "ORDER BY name"
            ).fetchall()
        ]
        connection.execute(_IMPRESSIONS)
        columns = [
            f"list_extract(context_values, list_position(context_names, {_quoted(name)})) "
            f'AS "{name.replace(chr(34), chr(34) * 2)}"'
            for name in contexts
        ]
        rows = connection.table("impressions").order("user_at, request_id, place")
        named = rows.project(", ".join([*_COLUMNS, *columns]))
        with complete_file(out) as part:
            named.write_parquet(str(part), compression="zstd")
        num_requests, num_impressions, num_clicked = _one(
            connection,
            "SELECT count(DISTINCT request_id), count(*), count(*) FILTER (clicked = 1) "
            "FROM impressions",
        )
        num_clicks, num_late, num_unmatched = _one(
            connection,
            "SELECT count(*), count(*) FILTER (is_late), count(*) FILTER (is_unmatched) "
            "FROM clicks",
        )
    return JoinedClicks(
        requests=num_requests,
        open_requests=num_open,
        repeated_requests=num_rows - num_latest,
        impressions=num_impressions,
        clicked=num_clicked,
        clicks=num_clicks,
        late_clicks=num_late,
        unmatched_clicks=num_unmatched,
    )


def write_dataset(base: LoadedDataSet, impressions: Path, toml: Path, *, window: timedelta) -> None:
    """Write a data set file: the events and items of another one, with served impressions.

    Its splits are the oldest 80 %, then 10 % for validation and the newest 10 % for the test; its
    label delay is the window, after which it is known what was clicked. It keeps the name of the
    other one: the journal of live events goes by it.

    Args:
        base: Gives events, items and options.
        impressions: The file of :func:`join_clicks`.
        toml: The data set file to write.
        window: Of the clicks.

    Raises:
        DataSetError: If the impressions lie at too few moments to be split by time.
    """
    with query_engine() as connection:
        first, valid, test, moments = _one(
            connection,
            "SELECT min(event_timestamp), quantile_disc(event_timestamp, ?), "
            "quantile_disc(event_timestamp, ?), count(DISTINCT event_timestamp) "
            "FROM read_parquet(?)",
            [1 - VALID_SHARE - TEST_SHARE, 1 - TEST_SHARE, str(impressions)],
        )
    if not first < valid < test:
        raise DataSetError(
            f"{impressions} cannot be split by time into train, valid and test: its rows are of "
            f"{moments:,} moment{'s' if moments > 1 else ''}, most of them of one; log requests "
            "over more time"
        )
    options = base.content.model_dump(mode="python", exclude_unset=True)
    options |= {
        "dir": str(base.data_dir),
        "label_delay_s": window.total_seconds(),
        # S608: the text is for the data set file; ingest runs it, as it runs the user's own.
        "impressions": {"sql": f"SELECT * FROM {_quoted(str(impressions.resolve()))}"},  # noqa: S608
        "split": {"valid": valid, "test": test},
    }
    with complete_file(toml) as part:
        part.write_text(_toml(options), encoding="utf-8")


def _load_clicks(connection: duckdb.DuckDBPyConnection, query: str, window: timedelta) -> None:
    """Make the table ``clicks``: one per request and item, the earliest."""
    try:
        given = connection.sql(query)
        if given is None:
            raise DataSetError("the query for clicks gives no rows: it must be one SELECT")
        given.create("given")
    except duckdb.Error as error:
        raise DataSetError(f"the clicks cannot be read: {str(error).splitlines()[0]}") from error
    kinds = dict(
        connection.execute(
            "SELECT column_name, data_type FROM information_schema.columns "
            "WHERE table_name = 'given'"
        ).fetchall()
    )
    for name in ("request_id", "item_id"):
        if name not in kinds:
            raise DataSetError(
                f"the clicks have no column {name!r}; they need request_id, item_id and, where "
                f"known, event_timestamp, and have {', '.join(kinds)}"
            )
        if kinds[name] in ("FLOAT", "DOUBLE"):
            raise DataSetError(f"the clicks hold {name} as fractions; ids must be text or integers")
    if "event_timestamp" not in kinds:
        connection.execute("ALTER TABLE given ADD COLUMN event_timestamp TIMESTAMPTZ")
    try:
        connection.execute(_CLICKS, [window])
    except duckdb.Error as error:
        raise DataSetError(
            "the clicks' event_timestamp must be times, for example 2026-01-31T09:30:00Z: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _one(
    connection: duckdb.DuckDBPyConnection, sql: str, parameters: Sequence[Any] = ()
) -> tuple[Any, ...]:
    row = connection.execute(sql, list(parameters)).fetchone()
    assert row is not None
    return tuple(row)


def _quoted(text: str) -> str:
    """A string of SQL."""
    return "'" + text.replace("'", "''") + "'"


def _toml(options: dict[str, Any]) -> str:
    """Plain values first, then one table per dictionary, as TOML wants it."""
    tables = {name: value for name, value in options.items() if isinstance(value, dict)}
    lines = [_line(name, value) for name, value in options.items() if name not in tables]
    for table, values in tables.items():
        lines += ["", f"[{table}]", *(_line(name, value) for name, value in values.items())]
    return "\n".join(lines) + "\n"


def _line(name: str, value: Any) -> str:
    if isinstance(value, datetime):
        return f"{name} = {value.isoformat()}"
    if isinstance(value, str) and "\n" in value and "'''" not in value:
        return f"{name} = '''\n{value.strip(chr(10))}\n'''"
    # A string, a number and a truth value of JSON are those of TOML.
    return f"{name} = {json.dumps(value, ensure_ascii=False)}"
