"""The tables that PostgreSQL holds: names, columns, indexes and comments, from files and views.

A view's table has the view's name, so every version (:mod:`feature_repo.version_names`) has a table
of its own. The canonical tables are ``canonical_events``,
``canonical_items``, ``canonical_impressions`` and ``canonical_behaviors``: there is a view
``items`` as well.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from psycopg import sql

from feature_repo.definitions import define
from feature_repo.home import Home
from feature_repo.offline_postgres import PART_COLUMN, view_key, view_table
from feature_repo.postgres_binary import sql_type
from feature_repo.postgres_session import Session

_PART_DESCRIPTION = "File that the row was loaded from; see longtrail_parts."
_CANONICAL = {
    "events": (
        "What users did, in words; one row per behaviour.",
        ("user_id", "event_timestamp"),
        {
            "user_id": "Who did it.",
            "event_timestamp": "When; UTC.",
            "scene": "Where or how, such as search or purchase.",
            "behavior_id": "63-bit hash of the normalised text; see canonical_behaviors.",
            "item_id": "The item it names; null where none.",
            "item_key": "64-bit hash of item_id; null where none.",
        },
    ),
    "items": (
        "Versions of every item; a version holds from its time until the next.",
        ("item_id", "event_timestamp"),
        {
            "item_id": "The item.",
            "event_timestamp": "When the version begins; UTC.",
            "text_id": "Behaviour id of the title; see canonical_behaviors.",
        },
    ),
    "impressions": (
        "Labelled requests: items that a user was shown.",
        ("user_id", "event_timestamp"),
        {
            "request_id": "Rows of one request share it.",
            "user_id": "Who was shown the item.",
            "item_id": "What was shown.",
            "event_timestamp": "When it was asked for; UTC.",
            "clicked": "1 where the user acted on it, else 0.",
            "split": "train, valid or test, by time; extra: sampled beside train, to learn from.",
        },
    ),
    "behaviors": (
        "Every distinct normalised behaviour text.",
        ("behavior_id",),
        {
            "behavior_id": "63-bit hash of the text.",
            "text": "The text, normalised.",
            "first_seen": "When it first appeared; UTC.",
            "num_events": "Events with this text.",
        },
    ),
}


@dataclass(frozen=True)
class LoadTable:
    """A table and the files that it is loaded from.

    Args:
        name: The table's name.
        files: Glob of its parquet files, which all have the same columns.
        columns: Column -> PostgreSQL's type, in order, the loader's own column last.
        index: Columns of the index: a key, and times, which are descending.
        unique: No two rows have equal values there.
        description: What it holds.
        descriptions: The same of its columns, as far as it is known.
    """

    name: str
    files: Path
    columns: dict[str, str]
    index: tuple[str, ...]
    unique: bool
    description: str
    descriptions: dict[str, str]

    @property
    def has_times(self) -> bool:
        """Whether its rows have an event time."""
        return "event_timestamp" in self.columns


def canonical_tables(home: Home) -> Iterator[LoadTable]:
    """The tables that ingest wrote, as far as they are there."""
    files = {
        "events": home.events / "part-*.parquet",
        "items": home.items,
        "impressions": home.impressions,
        "behaviors": home.behaviors,
    }
    for name, (description, index, descriptions) in _CANONICAL.items():
        if (columns := _columns(files[name])) is not None:
            yield LoadTable(
                name=f"canonical_{name}",
                files=files[name],
                columns=columns,
                index=index,
                unique=name == "behaviors",
                description=description,
                descriptions=_descriptions(columns, descriptions),
            )


def view_tables(home: Home) -> Iterator[LoadTable]:
    """The tables of the feature views that have files, whether applied or not."""
    for of_files, of_tables in zip(define(home).views, define(home, "postgres").views, strict=True):
        files = Path(of_files.batch_source.path)
        if (columns := _columns(files)) is not None:
            descriptions = {
                "event_timestamp": "Moment from which the row can be read; UTC.",
                "created_timestamp": "Of rows with equal times the later one counts; UTC.",
                **{field.name: field.description for field in of_tables.schema},
            }
            yield LoadTable(
                name=view_table(of_tables),
                files=files,
                columns=columns,
                index=(view_key(of_tables), "event_timestamp", "created_timestamp"),
                unique=True,
                description=of_tables.description,
                descriptions=_descriptions(columns, descriptions),
            )


def create_table(session: Session, table: LoadTable, name: str) -> None:
    """Create an empty table with its index and comments; one that a kill left is replaced."""
    columns = [
        sql.SQL("{} {} {}").format(
            sql.Identifier(column),
            sql.SQL(kind),
            sql.SQL("NOT NULL" if column in (*table.index, PART_COLUMN) else ""),
        )
        for column, kind in table.columns.items()
    ]
    session.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(sql.Identifier(name)))
    session.execute(
        sql.SQL("CREATE TABLE {} ({})").format(sql.Identifier(name), sql.SQL(", ").join(columns))
    )
    key, *times = table.index
    session.execute(
        sql.SQL("CREATE {} INDEX {} ON {} ({})").format(
            sql.SQL("UNIQUE" if table.unique else ""),
            sql.Identifier(f"{name}_by_{key}"),
            sql.Identifier(name),
            sql.SQL(", ").join(
                [
                    sql.Identifier(key),
                    *(sql.SQL("{} DESC").format(sql.Identifier(t)) for t in times),
                ]
            ),
        )
    )
    session.execute(
        sql.SQL("COMMENT ON TABLE {} IS {}").format(sql.Identifier(name), table.description)
    )
    for column, description in table.descriptions.items():
        session.execute(
            sql.SQL("COMMENT ON COLUMN {}.{} IS {}").format(
                sql.Identifier(name), sql.Identifier(column), description
            )
        )


def replace_table(session: Session, table: LoadTable, beside: str) -> None:
    """Put a new table in the place of the old one; readers of the old one finish first."""
    session.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(sql.Identifier(table.name)))
    for kind, old, new in (
        ("TABLE", beside, table.name),
        ("INDEX", f"{beside}_by_{table.index[0]}", f"{table.name}_by_{table.index[0]}"),
    ):
        session.execute(
            sql.SQL("ALTER {} {} RENAME TO {}").format(
                sql.SQL(kind), sql.Identifier(old), sql.Identifier(new)
            )
        )


def _columns(pattern: Path) -> dict[str, str] | None:
    """Column -> PostgreSQL's type of a glob of files, None where there is no file."""
    paths = sorted(pattern.parent.glob(pattern.name))
    if not paths:
        return None
    schema: pa.Schema = pq.read_schema(paths[-1])
    return {**{field.name: sql_type(field.type) for field in schema}, PART_COLUMN: "text"}


def _descriptions(columns: dict[str, str], known: dict[str, str]) -> dict[str, str]:
    """Descriptions of the columns that are there; a data set's own columns have none."""
    every = {**known, PART_COLUMN: _PART_DESCRIPTION}
    return {name: text for name, text in every.items() if name in columns}
