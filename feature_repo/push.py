"""Live events into the online store: a user's row, made from all of the user's events.

A row is a function of a set of events: those of the canonical tables and those of the journal. So
late events fall into their place, an event that both hold counts once, and whoever writes last has
seen everything. The row is the one that :mod:`feature_repo.sequences` builds of the same events;
``user_stats`` and what is counted of items stay those of the last build, as in a nightly batch.

Shapes: E = events, U = users, N = behaviours kept per scene.
"""

import logging
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from feast import FeatureStore, FeatureView
from feast.errors import FeatureViewNotFoundException
from filelock import FileLock
from sqlalchemy.exc import DBAPIError
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from feature_repo import sequences
from feature_repo.behavior import item_key
from feature_repo.errors import MissingStepError, StoreError
from feature_repo.fields import CREATED_TIMESTAMP, EVENT_TIMESTAMP, arrow_schema
from feature_repo.home import Home
from feature_repo.ingest import bucket_of
from feature_repo.live_events import EventJournal
from feature_repo.live_rows import JournalEvent
from feature_repo.manifest import DataManifest, LiveClock, load_manifest
from feature_repo.moments import moment_of
from feature_repo.online import OnlineWriter

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

USERS_AT_ONCE = 100
"""Users of one turn: whoever waits for one of them waits for all."""
RECENT_EVENTS = 200
"""Pushed again at each start: two seconds (what ``appendfsync everysec`` may leave unwritten) of a
hundred events a second, and at most two turns."""
EVENT_COLUMNS = ("user_id", EVENT_TIMESTAMP, "scene", "behavior_id", "item_key")
_TIME = pa.timestamp("us", tz="UTC")
_SWAP_S = 2.0
"""An ingest moves the old tables away a moment before the new ones are there."""


class TablesChangedError(StoreError):
    """What was read of the canonical tables is of two ingests."""


class LivePush:
    """Pushes users' rows; safe for threads and processes.

    Args:
        home: Where the canonical tables are.
        store: Feast's store, applied.
        writer: Its online store.
        journal: Of the live events.
    """

    def __init__(
        self, home: Home, store: FeatureStore, writer: OnlineWriter, journal: EventJournal
    ) -> None:
        self._home = home
        self._writer = writer
        self._journal = journal
        self._store = store
        self._views: dict[tuple[str, ...], FeatureView] = {}

    def push(self, user_ids: Sequence[str]) -> None:
        """Write the rows of users whose events changed, and mark these events as applied.

        Cost: reading one file of events for each bucket of the users, 10 ms for 200,000 events.

        Raises:
            StoreError: If a store fails; what was not marked is pushed again with the next event
                of the same user, or at the next start.
        """
        for start in range(0, len(user_ids), USERS_AT_ONCE):
            users = user_ids[start : start + USERS_AT_ONCE]
            with self._journal.turn(users) as turn:
                live = turn.events()
                manifest, base = stored_events(self._home, users)
                rows = newest_rows(pa.concat_tables([base, event_table(live)]), manifest)
                if live:
                    advance_clock(self._home, manifest, max(event.time for event in live))
                if rows.num_rows:
                    self._writer.write(self._view(manifest), rows)
                turn.mark_applied()

    def _view(self, manifest: DataManifest) -> FeatureView:
        """The view; asking the registry takes 5 ms, and only other scenes make it another."""
        if manifest.scenes not in self._views:
            view = self._applied(sequences.VIEW)
            if view is None:
                raise MissingStepError(f"{sequences.VIEW} is not applied: run `longtrail apply`")
            self._views[manifest.scenes] = view
        return self._views[manifest.scenes]

    def _applied(self, name: str) -> FeatureView | None:
        """A view as the registry has it; None where it has none."""
        try:
            return self._store.get_feature_view(name)
        except FeatureViewNotFoundException:
            return None
        except DBAPIError as error:
            raise StoreError(
                "the registry does not answer as it should "
                f"({str(error.orig).strip().splitlines()[0]}); check its server, then send the "
                "events again: each is taken once"
            ) from error

    def recover(self) -> int:
        """Push what a process that was killed had not applied; the number of its users.

        Users of the newest :data:`RECENT_EVENTS` are pushed once more: a Redis that writes its file
        once a second has forgotten theirs, where the whole machine went down.
        """
        pending = self._journal.pending_users()
        if pending:
            logger.warning("applying the live events of %d users left by a kill", len(pending))
        self.push(sorted({*pending, *self._journal.newest_users(RECENT_EVENTS)}))
        return len(pending)

    def push_vectors(self, view: str, rows: pa.Table) -> None:
        """Write vectors of behaviours; nothing where the view is not applied."""
        applied = self._applied(view)
        if applied is None:
            logger.warning("%s is not applied: its new vectors are not online", view)
            return
        for batch in rows.to_batches():
            self._writer.write(applied, batch)


def stored_events(home: Home, user_ids: Sequence[str]) -> tuple[DataManifest, pa.Table]:
    """The manifest, and some users' events of its tables (:data:`EVENT_COLUMNS`), of one ingest."""

    def read() -> tuple[DataManifest, pa.Table]:
        manifest = load_manifest(home)
        by_bucket: dict[int, list[str]] = {}
        for user in user_ids:
            by_bucket.setdefault(bucket_of(user, manifest.num_buckets), []).append(user)
        tables = [event_table([])]
        for bucket, users in by_bucket.items():
            # Not pq.read_table: its data set layer takes twice the time of reading everything.
            path = home.events / f"part-{bucket:05d}.parquet"
            with pq.ParquetFile(path) as parquet:
                groups = _groups_of(parquet, users)
                found = parquet.read_row_groups(groups, columns=list(EVENT_COLUMNS))
            found = found.filter(pc.is_in(found["user_id"], pa.array(users, pa.string())))
            tables.append(found.cast(tables[0].schema))
        if load_manifest(home).source_fingerprint != manifest.source_fingerprint:
            raise TablesChangedError(
                f"the tables in {home.tables} are replaced time after time: wait for the ingest"
            )
        return manifest, pa.concat_tables(tables)

    return read_tables(read)


def read_tables(read: Callable[[], Result]) -> Result:
    """Read canonical tables, again where an ingest is just replacing them.

    Args:
        read: Reads; it may be called several times.

    Raises:
        MissingStepError: If there are none.
        TablesChangedError: If ``read`` raises it time after time.
    """
    attempts = Retrying(
        retry=retry_if_exception_type((FileNotFoundError, MissingStepError, TablesChangedError)),
        stop=stop_after_delay(_SWAP_S),
        wait=wait_fixed(0.01),
        reraise=True,
    )
    return attempts(read)


def _groups_of(parquet: pq.ParquetFile, users: Sequence[str]) -> list[int]:
    """Row groups that may hold one of the users: the file is sorted by user."""
    column = parquet.schema_arrow.get_field_index("user_id")
    groups = []
    for group in range(parquet.num_row_groups):
        known = parquet.metadata.row_group(group).column(column).statistics
        if (
            known is None
            or not known.has_min_max
            or any(known.min <= user <= known.max for user in users)
        ):
            groups.append(group)
    return groups


def event_table(events: Sequence[JournalEvent]) -> pa.Table:
    """Events of the journal as the canonical tables have them (:data:`EVENT_COLUMNS`)."""
    return pa.table(
        {
            "user_id": pa.array([event.user_id for event in events], pa.string()),
            EVENT_TIMESTAMP: pa.array([event.time for event in events], pa.int64()).cast(_TIME),
            "scene": pa.array([event.scene for event in events], pa.string()),
            "behavior_id": pa.array([event.behavior_id for event in events], pa.int64()),
            "item_key": pa.array([item_key(event.item_id) for event in events], pa.int64()),
        }
    )


def newest_rows(events: pa.Table, manifest: DataManifest) -> pa.RecordBatch:
    """The newest row of ``user_sequences`` of each user; O(E log E).

    Args:
        events: E events (:data:`EVENT_COLUMNS`), in any order; equal ones count once.
        manifest: Scenes, N and the delay.

    Returns:
        U rows as the view's files have them.
    """
    users = events["user_id"].combine_chunks().dictionary_encode()
    scenes = pc.index_in(events["scene"], pa.array(manifest.scenes)).combine_chunks()
    ordered = np.stack(
        [
            users.indices.to_numpy().astype(np.int64),
            pc.fill_null(scenes, -1).to_numpy().astype(np.int64),
            events[EVENT_TIMESTAMP].cast(pa.int64()).to_numpy(),
            events["behavior_id"].to_numpy(),
            events["item_key"].to_numpy(),
        ]
    )
    ordered = ordered[:, ordered[1] >= 0]  # a scene that the data set does not have any more
    # By user, scene, then in the order of the batch: time, behaviour, item.
    ordered = ordered[:, np.lexsort(ordered[::-1])]
    repeats = (ordered[:, 1:] == ordered[:, :-1]).all(axis=0)
    ordered = np.delete(ordered, np.flatnonzero(repeats) + 1, axis=1)
    user, scene, time, behavior, item = ordered

    present, first = np.unique(user, return_index=True)
    newest = np.maximum.reduceat(time, first) if len(time) else time
    moments = pa.array(newest + manifest.availability_delay_us).cast(_TIME)
    columns = {
        "user_id": users.dictionary.take(pa.array(present)),
        EVENT_TIMESTAMP: moments,
        CREATED_TIMESTAMP: moments,
    }
    places = user * len(manifest.scenes) + scene  # ascending
    for code, name in enumerate(manifest.scenes):
        starts = np.searchsorted(places, present * len(manifest.scenes) + code)
        ends = np.searchsorted(places, present * len(manifest.scenes) + code, side="right")
        kept = np.maximum(starts, ends - manifest.sequence_length)
        chosen = np.concatenate(
            [np.arange(0), *(np.arange(a, b) for a, b in zip(kept, ends, strict=True))]
        )
        offsets = np.concatenate([[0], np.cumsum(ends - kept)]).astype(np.int32)
        lists = {
            "behavior_ids": behavior,
            "item_keys": item,
            "timestamps": time // 1_000_000,
        }
        for part, values in lists.items():
            columns[f"{name}_{part}"] = pa.ListArray.from_arrays(
                pa.array(offsets), pa.array(values[chosen])
            )
        columns[f"{name}_total"] = pa.array(ends - starts)
    schema = arrow_schema("user_id", sequences.fields(manifest))
    return pa.RecordBatch.from_arrays(
        [columns[field.name].cast(field.type) for field in schema], schema=schema
    )


def advance_clock(home: Home, manifest: DataManifest, newest: int) -> None:
    """Move the clock of a replayed data set on to an event, epoch microseconds.

    The row of the event can be read from then on, offline as online.
    """
    if not manifest.replay or moment_of(newest) <= _newest(manifest):
        return
    with FileLock(f"{home.live_clock}.lock", timeout=10):
        if moment_of(newest) > _newest(load_manifest(home)):
            LiveClock(newest_event=moment_of(newest)).save(home.live_clock)


def _newest(manifest: DataManifest) -> datetime:
    return max(manifest.last_event, manifest.newest_live or manifest.last_event)
