"""Where the corpus' documents come from: the home's canonical tables, and what a user names.

Everything is a stream: tables are read file by file and in batches.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from operator import itemgetter
from tempfile import TemporaryDirectory
from typing import Any

from encoders.lm.corpus import SourceKind, Split
from encoders.lm.records import Order, history_text, listing_text, order_text
from feature_repo.home import Home
from feature_repo.manifest import DataManifest
from feature_repo.manifest import Split as SplitTimes
from feature_repo.query_engine import query_engine

_FETCHED_ROWS = 10_000
_MEMORY_LIMIT = "4GB"
"""Of the query engine; what is larger goes to a temporary folder."""

_LISTINGS = """
SELECT items.event_timestamp, behaviors.text, {columns}
FROM read_parquet($items) items
JOIN read_parquet($behaviors) behaviors ON behaviors.behavior_id = items.text_id
ORDER BY items.event_timestamp, items.item_id
"""
_LINES = """
SELECT user_id, event_timestamp, scene, text
FROM read_parquet($events, file_row_number = true) events
JOIN read_parquet($behaviors) behaviors USING (behavior_id)
ORDER BY user_id, event_timestamp, events.file_row_number
"""

RawDocument = tuple[str, datetime | None]
"""A text, and the time of the last thing in it, UTC; None where there is none."""


@dataclass(frozen=True)
class Source:
    """A named stream of documents.

    Args:
        name: Of its files.
        kind: Whose text it is.
        origin: Where it is from, in words.
        is_record: Written by templates: no quality filter, no language.
        deduplicate: Whether texts that were there before are left out. Orders and histories that
            are alike are data: what is bought often shall be read often.
        identity: JSON value of what decides the documents.
        read: Begins the stream.
    """

    name: str
    kind: SourceKind
    origin: str
    is_record: bool
    deduplicate: bool
    identity: Any
    read: Callable[[], Iterator[RawDocument]]

    def fingerprint(self, options: Mapping[str, Any]) -> str:
        """Of the documents, given the options of all sources."""
        identity = [self.name, self.kind, self.is_record, self.deduplicate, self.identity, options]
        text = json.dumps(identity, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def split_at(time: datetime, times: SplitTimes) -> Split:
    """The split of a document of some time."""
    return "train" if time < times.valid else "valid" if time < times.test else "test"


def table_sources(home: Home, manifest: DataManifest, *, history_days: int) -> list[Source]:
    """``listings``, ``baskets`` and ``histories`` of the canonical tables.

    Args:
        home: Ingest has been run.
        manifest: Of its tables.
        history_days: Length of the periods that histories are cut into.
    """
    made_by = [manifest.source_fingerprint, manifest.live_sequence]
    split = [manifest.split.valid, manifest.split.test]

    def baskets() -> Iterator[RawDocument]:
        for _, orders in _users(home):
            for order in orders:
                yield order_text(order), order.time

    def histories() -> Iterator[RawDocument]:
        for _, orders in _users(home):
            # A history that spanned a cut would carry what is held out into training.
            periods = groupby(orders, lambda order: _period(order.time, history_days, manifest))
            for _, period in periods:
                kept = list(period)
                yield history_text(kept), kept[-1].time

    def table_source(
        name: str,
        origin: str,
        read: Callable[[], Iterator[RawDocument]],
        *,
        deduplicate: bool = False,
        identity: Any = None,
    ) -> Source:
        return Source(
            name=name,
            kind="domain",
            origin=f"{origin} of {manifest.dataset}",
            is_record=True,
            deduplicate=deduplicate,
            identity=[made_by, split, identity],
            read=read,
        )

    return [
        table_source(
            "listings", "item versions", lambda: _listings(home, manifest), deduplicate=True
        ),
        table_source("baskets", "what users did at one moment,", baskets),
        table_source(
            "histories",
            f"what users did in {history_days} days,",
            histories,
            identity=history_days,
        ),
    ]


def _listings(home: Home, manifest: DataManifest) -> Iterator[RawDocument]:
    names = [column.name for column in manifest.item_columns]
    quoted = ", ".join('items."' + name.replace('"', '""') + '"' for name in names)
    query = _LISTINGS.format(columns=quoted or "NULL")
    parameters = {"items": str(home.items), "behaviors": str(home.behaviors)}
    for time, title, *values in _rows(query, parameters):
        yield listing_text(title, dict(zip(names, values, strict=False))), time


def _users(home: Home) -> Iterator[tuple[str, list[Order]]]:
    """Every user with all orders, oldest first; lines of an order as the table has them."""
    for path in sorted(home.events.glob("*.parquet")):  # a user is in one file
        lines = _rows(_LINES, {"events": str(path), "behaviors": str(home.behaviors)})
        for user, of_user in groupby(lines, itemgetter(0)):
            orders = [
                Order(time, [(scene, text) for _, _, scene, text in rows])
                for time, rows in groupby(of_user, itemgetter(1))
            ]
            yield user, orders


def _period(time: datetime, days: int, manifest: DataManifest) -> tuple[int, Split]:
    return (time - manifest.first_event).days // days, split_at(time, manifest.split)


def _rows(query: str, parameters: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    with (
        TemporaryDirectory() as scratch,
        query_engine({"memory_limit": _MEMORY_LIMIT, "temp_directory": scratch}) as connection,
    ):
        cursor = connection.execute(query, parameters)
        while rows := cursor.fetchmany(_FETCHED_ROWS):
            yield from rows
