"""Rows of the three queries: their columns and types, and why a row is set aside.

Everything here is SQL on one DuckDB connection, so that it does not matter how many rows there are;
only distinct texts and ids pass through Python.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import duckdb
import pyarrow as pa

from feature_repo.behavior import behavior_id, hash63, item_key, normalize
from feature_repo.dataset import LoadedDataSet
from feature_repo.errors import DataSetError

_INTEGER = re.compile(r"^U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?$")
_NUMERIC = re.compile(r"^(U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?|FLOAT|DOUBLE|DECIMAL.*|BOOLEAN)$")
_TIME = re.compile(r"^(TIMESTAMP.*|DATE)$")
_SCENE = r"^[a-z][a-z0-9_]{0,30}$"
_SCENE_REASON = "scene is not a lower-case name of letters, digits and _"
_EARLIEST = "1970-01-02 00:00:00+00"
"""Stores take the epoch for a missing time."""
MAX_SCENES = 16
"""Every scene adds columns to the feature views; more are a text put in the wrong column."""
BROKEN_TEXT = re.compile("[\ufffd\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
"""The replacement character and control characters: signs of a wrong encoding."""


@dataclass(frozen=True)
class Contract:
    """Columns of one query.

    Args:
        ids: Required; strings, integers are cast.
        optional_ids: The same, but may be absent or null.
        texts: Required strings.
        times: Required times.
        optional_times: The same, but the column may be absent.
        others: Whether more columns are allowed, ``numeric``, ``any`` or ``none``.
    """

    ids: tuple[str, ...] = ()
    optional_ids: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    times: tuple[str, ...] = ()
    optional_times: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    optional_texts: tuple[str, ...] = ()
    others: str = "none"


CONTRACTS = {
    "events": Contract(
        ids=("user_id",),
        optional_ids=("item_id",),
        texts=("scene", "text"),
        times=("event_timestamp",),
    ),
    "items": Contract(
        ids=("item_id",), texts=("text",), optional_times=("event_timestamp",), others="any"
    ),
    "impressions": Contract(
        ids=("request_id", "user_id", "item_id"),
        times=("event_timestamp",),
        flags=("clicked",),
        optional_texts=("split",),
        others="numeric",
    ),
}


@dataclass(frozen=True)
class LoadedQuery:
    """A query's rows in the table ``raw_<name>``, with their number ``row`` from 1 on.

    Args:
        name: ``events``, ``items`` or ``impressions``.
        types: Column -> DuckDB type, in the query's order.
        naive_times: Time columns without zone, taken as UTC.
        num_rows: Rows of the result.
        files: Where they came from, for reports.
    """

    name: str
    types: dict[str, str]
    naive_times: tuple[str, ...]
    num_rows: int
    files: str

    @property
    def others(self) -> dict[str, str]:
        """Columns beyond the contract's own -> DuckDB type."""
        contract = CONTRACTS[self.name]
        own = (
            *contract.ids,
            *contract.optional_ids,
            *contract.texts,
            *contract.times,
            *contract.optional_times,
            *contract.flags,
            *contract.optional_texts,
        )
        return {name: kind for name, kind in self.types.items() if name not in own}


def run_query(
    connection: duckdb.DuckDBPyConnection, dataset: LoadedDataSet, name: str, sql: str
) -> LoadedQuery:
    """Run a query of the data set into the table ``raw_<name>`` and check its columns.

    Raises:
        DataSetError: If the SQL is wrong, a file is missing or unreadable, the result is empty, or
            a column is missing, unknown or of the wrong type.
    """
    where = f"{dataset.path.name}: query [{name}]"
    files = dataset.files(sql)
    for file in files:
        if not file.exists():
            raise DataSetError(
                f"{where} reads {file}, which does not exist; put the file there, or name its "
                "folder with --data-dir or LONGTRAIL_DATA_DIR"
            )
    try:
        connection.execute(
            f"CREATE OR REPLACE TABLE raw_{name} AS "
            f'SELECT row_number() OVER () AS "row", q.* FROM (\n{dataset.sql(sql)}\n) AS q'
        )
    except duckdb.Error as error:
        raise DataSetError(f"{where}: {_sql_sentence(error)}") from error
    described = connection.execute(f"DESCRIBE raw_{name}").fetchall()
    types = {row[0]: str(row[1]) for row in described if row[0] != "row"}
    loaded = LoadedQuery(
        name=name,
        types=types,
        naive_times=_check_types(where, CONTRACTS[name], types),
        num_rows=_count(connection, f"raw_{name}"),
        files=", ".join(file.name for file in files),
    )
    if not loaded.num_rows:
        raise DataSetError(f"{where} returned no rows; check its WHERE clause and its files")
    return loaded


def _sql_sentence(error: duckdb.Error) -> str:
    """DuckDB's message in one line; the line numbers are those of the query in the file."""
    text = str(error)
    # The query stands in a subquery, one line further down.
    text = re.sub(r"LINE (\d+):", lambda found: f"(line {int(found[1]) - 1}):", text)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    kept = [line for line in lines if line and not set(line) <= {"^", " "}]
    sentence = " ".join(kept)[:500]
    if "unicode" in text.lower():
        sentence += " Read it with read_csv('...', encoding = 'latin-1') or the encoding it has."
    return sentence


def _check_types(where: str, contract: Contract, types: dict[str, str]) -> tuple[str, ...]:
    """Names of the time columns without zone."""
    required = (*contract.ids, *contract.texts, *contract.times, *contract.flags)
    missing = [name for name in required if name not in types]
    if missing:
        raise DataSetError(
            f"{where}: column {missing[0]} is missing; expected {', '.join(required)}, "
            f"got {', '.join(types)}; name it with AS"
        )

    def expect(column: str, ok: bool, wanted: str) -> None:
        if not ok:
            raise DataSetError(
                f"{where}: column {column} must be {wanted}, got {types[column]}; cast it in the "
                "SQL"
            )

    for column, kind in types.items():
        if column in (*contract.ids, *contract.optional_ids):
            ok = kind == "VARCHAR" or bool(_INTEGER.match(kind))
            expect(column, ok, "text or an integer")
        elif column in (*contract.texts, *contract.optional_texts):
            expect(column, kind == "VARCHAR", "text")
        elif column in (*contract.times, *contract.optional_times):
            expect(column, bool(_TIME.match(kind)), "a timestamp")
        elif column in contract.flags:
            ok = kind == "BOOLEAN" or bool(_INTEGER.match(kind))
            expect(column, ok, "0 or 1")
        elif contract.others == "none":
            known = (*required, *contract.optional_ids)
            raise DataSetError(
                f"{where}: unknown column {column}; expected {', '.join(known)}; leave it out"
            )
        else:
            if not re.match(r"^[a-z][a-z0-9_]*$", column):
                raise DataSetError(
                    f"{where}: column {column!r} cannot name a feature; expected lower-case "
                    "letters, digits and _; rename it with AS"
                )
            numeric = bool(_NUMERIC.match(kind))
            if contract.others == "numeric":
                expect(column, numeric, "a number")
            else:
                expect(column, numeric or kind == "VARCHAR", "a number or text")
    times = (*contract.times, *contract.optional_times)
    return tuple(c for c in times if c in types and types[c] != "TIMESTAMP WITH TIME ZONE")


def is_numeric(kind: str) -> bool:
    """Whether a DuckDB type is a number."""
    return bool(_NUMERIC.match(kind))


def map_texts(
    connection: duckdb.DuckDBPyConnection, sources: Sequence[str], dataset: LoadedDataSet
) -> None:
    """Normalise every distinct text of ``sources`` into the table ``texts``.

    Columns: raw, text, behavior_id (null where rejected), reason (null where accepted).

    Raises:
        DataSetError: If two texts have the same id.
    """
    union = " UNION ".join(f'SELECT "text" AS raw FROM {s}' for s in sources)
    raws = connection.execute(f"SELECT DISTINCT raw FROM ({union}) ORDER BY raw").fetchall()
    options = dataset.content
    by_id: dict[int, str] = {}
    rows: list[tuple[str, str | None, int | None, str | None]] = []
    for (raw,) in raws:
        if raw is None:
            continue
        text, reason = normalize(raw, lowercase=options.lowercase), None
        if not text:
            reason = "text is empty"
        elif BROKEN_TEXT.search(raw):
            reason = "text has a broken encoding (control or replacement characters)"
        elif len(text) > options.max_text_length:
            reason = f"text is longer than {options.max_text_length} characters"
        if reason:
            rows.append((raw, None, None, reason))
            continue
        key = behavior_id(text)
        if by_id.setdefault(key, text) != text:
            raise DataSetError(
                f"the texts {by_id[key]!r} and {text!r} have the same 63-bit id; change one of "
                "them in the SQL"
            )
        rows.append((raw, text, key, None))
    schema = pa.schema(
        {"raw": pa.string(), "text": pa.string(), "behavior_id": pa.int64(), "reason": pa.string()}
    )
    _create(connection, "texts", rows, schema)


def map_keys(
    connection: duckdb.DuckDBPyConnection, table: str, sql: str, *, name: str, items: bool
) -> None:
    """Hash every distinct id that ``sql`` returns into ``table`` (``name``, ``key``).

    Raises:
        DataSetError: If two ids have the same hash.
    """
    values = [row[0] for row in connection.execute(sql).fetchall() if row[0] is not None]
    keys = [item_key(value) if items else hash63(value) for value in values]
    if len(set(keys)) != len(keys):
        raise DataSetError(f"two values of {name} have the same 63-bit hash; rename one of them")
    schema = pa.schema({name: pa.string(), "key": pa.int64()})
    _create(connection, table, list(zip(values, keys, strict=True)), schema)


def _create(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    rows: Sequence[tuple[object, ...]],
    schema: pa.Schema,
) -> None:
    columns = list(zip(*rows, strict=True)) if rows else [() for _ in schema]
    arrow = pa.table([pa.array(c, t) for c, t in zip(columns, schema.types, strict=True)], schema)
    connection.register("arrow_rows", arrow)
    connection.execute(f"CREATE OR REPLACE TABLE {table} AS SELECT * FROM arrow_rows")
    connection.unregister("arrow_rows")


def _count(connection: duckdb.DuckDBPyConnection, table: str) -> int:
    row = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    assert row is not None
    return int(row[0])


# The reason why a row is set aside, as SQL: the first that holds.
_ID = "trim(CAST(r.{0} AS VARCHAR))"


def _time_reasons(column: str) -> list[str]:
    return [
        f"WHEN r.{column} IS NULL THEN '{column} is missing'",
        f"WHEN NOT isfinite(r.{column}) THEN '{column} is infinite'",
        f"WHEN r.{column} < TIMESTAMPTZ '{_EARLIEST}' THEN '{column} is before 1970-01-02'",
        f"WHEN r.{column} > now() THEN '{column} is in the future'",
    ]


def _id_reasons(column: str) -> list[str]:
    value = _ID.format(column)
    return [f"WHEN r.{column} IS NULL OR {value} = '' THEN '{column} is missing'"]


def _text_reasons() -> list[str]:
    return [
        "WHEN r.text IS NULL THEN 'text is missing'",
        "WHEN t.reason IS NOT NULL THEN t.reason",
    ]


def _case(reasons: Sequence[str]) -> str:
    return "CASE " + " ".join(reasons) + " END"


def _as_time(loaded: LoadedQuery, column: str) -> str:
    """Replacement of a time column by microseconds with zone, UTC where it has none."""
    if column in loaded.naive_times:
        return f"CAST({column} AS TIMESTAMP) AT TIME ZONE 'UTC' AS {column}"
    return f"CAST({column} AS TIMESTAMPTZ) AS {column}"


def check_events(connection: duckdb.DuckDBPyConnection, loaded: LoadedQuery) -> None:
    """Make ``checked_events`` of ``raw_events`` and ``texts``: canonical columns and ``reason``.

    Raises:
        DataSetError: If there are too many scenes.
    """
    item = _ID.format("item_id") if "item_id" in loaded.types else "NULL"
    reasons = [
        *_id_reasons("user_id"),
        *_time_reasons("event_timestamp"),
        "WHEN r.scene IS NULL OR r.scene = '' THEN 'scene is missing'",
        f"WHEN NOT regexp_matches(r.scene, '{_SCENE}') THEN '{_SCENE_REASON}'",
        *_text_reasons(),
    ]
    connection.execute(f"""
        CREATE OR REPLACE TABLE checked_events AS
        WITH r AS (SELECT * REPLACE ({_as_time(loaded, "event_timestamp")}) FROM raw_events),
        c AS (
            SELECT r."row", {_ID.format("user_id")} AS user_id, r.event_timestamp, r.scene, t.text,
                t.behavior_id, nullif({item}, '') AS item_id, {_case(reasons)} AS reason
            FROM r LEFT JOIN texts t ON t.raw = r.text
        )
        SELECT * REPLACE (CASE WHEN reason IS NULL AND row_number() OVER (
            PARTITION BY user_id, event_timestamp, scene, behavior_id, item_id ORDER BY "row"
        ) > 1 THEN 'duplicate of another row' ELSE reason END AS reason) FROM c
    """)
    scenes = connection.execute(
        "SELECT DISTINCT scene FROM checked_events WHERE reason IS NULL ORDER BY scene"
    ).fetchall()
    if len(scenes) > MAX_SCENES:
        raise DataSetError(
            f"[events] has {len(scenes)} scenes ({', '.join(s[0] for s in scenes[:5])}, ...), "
            f"expected at most {MAX_SCENES}; a scene is a kind of behaviour such as purchase"
        )


def check_items(connection: duckdb.DuckDBPyConnection, loaded: LoadedQuery) -> None:
    """Make ``checked_items``: item_id, event_timestamp, text, text_id, the columns, ``reason``.

    Items without a time are known from the epoch's first day on.
    """
    timed = "event_timestamp" in loaded.types
    replace = f"REPLACE ({_as_time(loaded, 'event_timestamp')})" if timed else ""
    time = "r.event_timestamp" if timed else f"TIMESTAMPTZ '{_EARLIEST}'"
    reasons = [
        *_id_reasons("item_id"),
        *(_time_reasons("event_timestamp") if timed else []),
        *_text_reasons(),
    ]
    others = "".join(
        f", CAST(r.{name} AS {'FLOAT' if is_numeric(kind) else 'VARCHAR'}) AS {name}"
        for name, kind in loaded.others.items()
    )
    connection.execute(f"""
        CREATE OR REPLACE TABLE checked_items AS
        WITH r AS (SELECT * {replace} FROM raw_items),
        c AS (
            SELECT r."row", {_ID.format("item_id")} AS item_id, {time} AS event_timestamp, t.text,
                t.behavior_id AS text_id {others}, {_case(reasons)} AS reason
            FROM r LEFT JOIN texts t ON t.raw = r.text
        )
        SELECT * REPLACE (CASE WHEN reason IS NULL AND row_number() OVER (
            PARTITION BY item_id, event_timestamp ORDER BY "row"
        ) > 1 THEN 'second row for one item and time' ELSE reason END AS reason) FROM c
    """)


def check_impressions(connection: duckdb.DuckDBPyConnection, loaded: LoadedQuery) -> None:
    """Make ``checked_impressions``: canonical columns, context columns and ``reason``."""
    split = "r.split" if "split" in loaded.types else "CAST(NULL AS VARCHAR)"
    reasons = [
        *_id_reasons("request_id"),
        *_id_reasons("user_id"),
        *_id_reasons("item_id"),
        *_time_reasons("event_timestamp"),
        "WHEN r.clicked IS NULL THEN 'clicked is missing'",
        "WHEN CAST(r.clicked AS INTEGER) NOT IN (0, 1) THEN 'clicked is not 0 or 1'",
    ]
    if "split" in loaded.types:
        reasons.append(
            "WHEN r.split IS NULL OR r.split NOT IN ('train', 'valid', 'test') "
            "THEN 'split is not train, valid or test'"
        )
    others = "".join(f", CAST(r.{name} AS FLOAT) AS {name}" for name in loaded.others)
    ids = ", ".join(f"{_ID.format(c)} AS {c}" for c in ("request_id", "user_id", "item_id"))
    connection.execute(f"""
        CREATE OR REPLACE TABLE checked_impressions AS
        WITH r AS (SELECT * REPLACE ({_as_time(loaded, "event_timestamp")}) FROM raw_impressions),
        c AS (
            SELECT r."row", {ids}, r.event_timestamp,
                CAST(CAST(r.clicked AS INTEGER) AS TINYINT) AS clicked, {split} AS split {others},
                {_case(reasons)} AS reason
            FROM r
        ),
        d AS (SELECT *, min(user_id) OVER w != max(user_id) OVER w
                OR min(event_timestamp) OVER w != max(event_timestamp) OVER w AS torn
            FROM c WINDOW w AS (PARTITION BY request_id))
        SELECT * EXCLUDE (torn) REPLACE (CASE
            WHEN reason IS NOT NULL THEN reason
            WHEN torn THEN 'its request_id has several users or times'
            WHEN row_number() OVER (PARTITION BY request_id, item_id ORDER BY "row") > 1
            THEN 'item twice in one request' END AS reason) FROM d
    """)
