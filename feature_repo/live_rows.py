"""Rows of the journal of live events: the table, an event, and a turn to apply those of users."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

_CHUNK = 500
"""Values in one statement; databases limit them."""

METADATA = sa.MetaData()
EVENTS = sa.Table(
    "live_events",
    METADATA,
    sa.Column(
        "sequence",
        sa.BigInteger().with_variant(sa.Integer, "sqlite"),
        primary_key=True,
        comment="Order of acceptance.",
    ),
    sa.Column("dataset", sa.Text, nullable=False, comment="Data set that it is an event of."),
    sa.Column("event_id", sa.Text, nullable=False, comment="The caller's: an event is taken once."),
    sa.Column("user_id", sa.Text, nullable=False, comment="Who did it."),
    sa.Column("scene", sa.Text, nullable=False, comment="Where or how."),
    sa.Column("text", sa.Text, nullable=False, comment="The behaviour, normalised."),
    sa.Column("behavior_id", sa.BigInteger, nullable=False, comment="63-bit hash of the text."),
    sa.Column("item_id", sa.Text, comment="The item it names; null where none."),
    sa.Column("time", sa.BigInteger, nullable=False, comment="When; epoch microseconds, UTC."),
    sa.Column("applied", sa.Boolean, nullable=False, comment="Whether the online store has it."),
    sa.UniqueConstraint("dataset", "event_id"),
    sa.Index("live_events_by_user", "dataset", "user_id"),
    sa.Index("live_events_pending", "dataset", "applied"),
    comment="Events that were taken by the service, in the order of acceptance.",
)


@dataclass(frozen=True)
class JournalEvent:
    """An event that can be used.

    Args:
        event_id: The caller's.
        user_id: Who.
        scene: One of the data set's.
        text: Normalised.
        behavior_id: Of the text.
        item_id: What it is about, if anything.
        time: Epoch microseconds.
    """

    event_id: str
    user_id: str
    scene: str
    text: str
    behavior_id: int
    item_id: str | None
    time: int


class Turn:
    """The right to apply events of some users, as :class:`EventJournal` gives it.

    Args:
        connection: In a transaction.
        mine: The events of the data set.
        user_ids: The users.
    """

    def __init__(
        self, connection: sa.Connection, mine: sa.ColumnElement[bool], user_ids: list[str]
    ) -> None:
        self._connection = connection
        self._mine = mine
        self._user_ids = user_ids
        self._seen = 0

    def events(self, *, after: int = 0) -> list[JournalEvent]:
        """Events of the users behind the one of a number, applied or not."""
        names = list(JournalEvent.__dataclass_fields__)
        columns = [EVENTS.c.sequence, *(EVENTS.c[name] for name in names)]
        query = sa.select(*columns).where(self._mine, EVENTS.c.sequence > after)
        rows = [
            row
            for part in chunks(self._user_ids)
            for row in self._connection.execute(query.where(EVENTS.c.user_id.in_(part)))
        ]
        self._seen = max((sequence for sequence, *_ in rows), default=0)
        return [JournalEvent(*values) for _, *values in rows]

    def mark_applied(self) -> None:
        """Note that the stores hold what :meth:`events` gave; others may have come since."""
        for part in chunks(self._user_ids):
            self._connection.execute(
                sa.update(EVENTS)
                .where(
                    self._mine,
                    ~EVENTS.c.applied,
                    EVENTS.c.sequence <= self._seen,
                    EVENTS.c.user_id.in_(part),
                )
                .values(applied=True)
            )


def chunks(values: Iterable[Any]) -> Iterator[list[Any]]:
    """Values in parts that fit one statement."""
    whole = list(values)
    for start in range(0, len(whole), _CHUNK):
        yield whole[start : start + _CHUNK]
