"""Parquet files of the views that ``longtrail sequences`` builds.

User views (:class:`BucketedView`) are built one event bucket at a time, resumed and extended; item
views (:class:`WholeView`) need all events at once and are replaced as a whole.

Beside ``part-<bucket>.parquet`` lies ``state-<bucket>.json``: which events and settings it was made
of. From that the next run tells whether the bucket is unchanged (nothing is done), only grew after
its last event (the new rows go to ``part-<bucket>-<n>.parquet``) or changed in its past (its files
are replaced). A file without a state is the rest of a run that was killed: it is removed.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from pydantic import AwareDatetime

from feature_repo.errors import MissingStepError, StoreError
from feature_repo.fields import CREATED_TIMESTAMP
from feature_repo.home import Home, complete_file, complete_folder, tidy_folder
from feature_repo.manifest import DataManifest, Document
from feature_repo.progress import Progress

logger = logging.getLogger(__name__)

DAY_S = 86_400
MEMORY_LIMIT = "1GB"
"""What the query engine may hold before it writes to disk."""
ROW_GROUP_SIZE = 20_000
"""Rows per parquet row group: about 100 MB before encoding, for two scenes of 100 behaviours."""
MAX_ADDITIONS = 16
"""A bucket with this many additional files is rebuilt into one, so that files stay few."""


@dataclass(frozen=True)
class BuildSummary:
    """What a build did.

    Args:
        num_rows: Rows of the view after the build.
        num_new_rows: Rows written by this build.
        num_buckets_built: Buckets that were not skipped as unchanged.
        seconds: Wall-clock time.
    """

    num_rows: int
    num_new_rows: int
    num_buckets_built: int
    seconds: float


class EventsIdentity(Document):
    """Identity of a bucket's events, whatever their order in the file."""

    num_events: int
    events_hash: int
    """Exclusive or of the hashes of the rows; no two rows are equal."""
    last_event: AwareDatetime | None
    """None where there are no events."""


class BucketState(Document):
    """What a bucket's files were made of."""

    settings: str
    """Hash of everything besides the events that the rows depend on."""
    events: EventsIdentity
    files: dict[str, int]
    """File name -> rows."""


BucketRows = Callable[[Any, int, Any, datetime | None], Any]
"""``(connection, bucket, events, after) -> rows``, both ibis tables; with ``after`` only the rows
whose source is later than that."""


@dataclass(frozen=True)
class BucketedView:
    """A view with one file per event bucket.

    Args:
        folder: Where its files lie.
        schema: Columns of its files.
        settings: JSON values besides the events on which the rows depend.
        rows: Makes a bucket's rows.
        extendable: ``rows`` can make the rows after a moment alone.
    """

    folder: Path
    schema: pa.Schema
    settings: dict[str, Any]
    rows: BucketRows
    extendable: bool

    def build(self, home: Home, progress: Progress, *, threads: int) -> BuildSummary:
        """Bring every bucket's files up to date; see the module's docstring.

        Raises:
            MissingStepError: If there are no events.
            LongtrailError: If another process builds the same view.
        """
        start = time.perf_counter()
        name = self.folder.name
        with home.lock(name):
            buckets = event_buckets(home)
            sizes = {b: pq.read_metadata(path).num_rows for b, path in buckets.items()}
            total = sum(sizes.values())
            settings = settings_hash(self.schema, self.settings)
            states = self._usable_states(settings, set(buckets))
            num_rows = num_new_rows = num_built = 0
            with engine(home, name, threads=threads) as connection:
                for bucket, path in buckets.items():
                    events = connection.read_parquet(path)
                    state = self._update(connection, bucket, events, states.get(bucket), settings)
                    if state != states.get(bucket):
                        old = states.get(bucket)
                        num_built += 1
                        num_new_rows += _new_rows(old, state)
                    num_rows += sum(state.files.values())
                    progress(sizes[bucket], total)
        seconds = time.perf_counter() - start
        return BuildSummary(num_rows, num_new_rows, num_built, seconds)

    def _state_path(self, bucket: int) -> Path:
        return self.folder / f"state-{bucket:05d}.json"

    def _usable_states(self, settings: str, buckets: set[int]) -> dict[int, BucketState]:
        """Return the states that still hold; remove the files that belong to none of them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        states = {}
        for path in sorted(self.folder.glob("state-*.json")):
            bucket = int(path.stem.split("-")[1])
            try:
                state = BucketState.load(path, made_by="longtrail sequences")
            except StoreError as error:  # of another version: built anew
                logger.info("%s", error)
                path.unlink()
                continue
            complete = all((self.folder / name).exists() for name in state.files)
            if bucket in buckets and state.settings == settings and complete:
                states[bucket] = state
            else:
                path.unlink()
        known = {name for state in states.values() for name in state.files}
        for path in self.folder.glob("part-*"):
            if path.name not in known:
                path.unlink()
        return states

    def _update(
        self, connection: Any, bucket: int, events: Any, state: BucketState | None, settings: str
    ) -> BucketState:
        """Bring one bucket up to date and return its state."""
        identity = events_identity(events, connection)
        if state is not None and identity == state.events:
            return state
        if state is not None and self._only_grew(connection, events, identity, state):
            after = state.events.last_event
            kept = dict(state.files)
            path = self.folder / f"part-{bucket:05d}-{len(kept):04d}.parquet"
        else:
            after, kept = None, {}
            path = self.folder / f"part-{bucket:05d}.parquet"
        rows = self.rows(connection, bucket, events, after)
        with complete_file(path) as part:
            num_rows = write_rows(connection, rows, self.schema, part)
            if after is None and state is not None:
                # From here to the new state a kill leaves no state: the next run builds anew.
                self._state_path(bucket).unlink()
                for name in state.files:
                    if name != path.name:
                        (self.folder / name).unlink()
        new = BucketState(settings=settings, events=identity, files={**kept, path.name: num_rows})
        new.save(self._state_path(bucket))
        return new

    def _only_grew(
        self, connection: Any, events: Any, identity: EventsIdentity, state: BucketState
    ) -> bool:
        """Whether the events up to the last one of the state are those of the state."""
        last = state.events.last_event
        if (
            not self.extendable
            or last is None
            or len(state.files) > MAX_ADDITIONS
            or identity.num_events <= state.events.num_events
        ):
            return False
        past = events.filter(events.event_timestamp <= ibis.literal(last))
        return events_identity(past, connection) == state.events


class WholeState(Document):
    """What the files of a view were made of; lies beside them as ``state.json``."""

    fingerprint: str
    """Hash of everything that the rows depend on."""
    files: dict[str, int]
    """File name -> rows."""


WriteParts = Callable[[Any, Path, Callable[[int, int], None]], dict[str, int]]
"""``(connection, folder, done) -> files``: write the parts, tell ``done(part, num_parts)`` after
each, return file name -> rows."""


@dataclass(frozen=True)
class WholeView:
    """A view whose files are replaced together.

    Args:
        folder: Where its files lie.
        schema: Of its files.
        settings: JSON values besides the events on which the rows depend.
        write: Makes the files.
    """

    folder: Path
    schema: pa.Schema
    settings: dict[str, Any]
    write: WriteParts

    def build(self, home: Home, progress: Progress, *, threads: int) -> BuildSummary:
        """Build the files where the events or the settings changed.

        Raises:
            MissingStepError: If there are no events.
            LongtrailError: If another process builds the same view.
        """
        start = time.perf_counter()
        name = self.folder.name
        with home.lock(name), engine(home, name, threads=threads) as connection:
            tidy_folder(self.folder)  # of a run that was killed
            buckets = event_buckets(home)
            total = sum(pq.read_metadata(path).num_rows for path in buckets.values())
            identities = [
                events_identity(connection.read_parquet(path), connection).model_dump(mode="json")
                for path in buckets.values()
            ]
            fingerprint = settings_hash(self.schema, {**self.settings, "events": identities})
            state = self._usable_state()
            if state is not None and state.fingerprint == fingerprint:
                progress(total, total)
                return BuildSummary(sum(state.files.values()), 0, 0, time.perf_counter() - start)

            def done(index: int, num_parts: int) -> None:
                progress(total * (index + 1) // num_parts - total * index // num_parts, total)

            with complete_folder(self.folder) as part:
                files = self.write(connection, part, done)
                WholeState(fingerprint=fingerprint, files=files).save(part / "state.json")
        num_rows = sum(files.values())
        return BuildSummary(num_rows, num_rows, len(buckets), time.perf_counter() - start)

    def _usable_state(self) -> WholeState | None:
        """The state of the files that are there; None where they are not all there."""
        path = self.folder / "state.json"
        if not path.exists():
            return None
        try:
            state = WholeState.load(path, made_by="longtrail sequences")
        except StoreError as error:  # of another version: built anew
            logger.info("%s", error)
            return None
        return state if all((self.folder / name).exists() for name in state.files) else None


def event_buckets(home: Home) -> dict[int, Path]:
    """Bucket -> its file of events.

    Raises:
        MissingStepError: If there is none.
    """
    paths = sorted(home.events.glob("part-*.parquet"))
    if not paths:
        raise MissingStepError(f"{home.events} holds no events yet: run `longtrail ingest` first")
    return {int(path.stem.split("-")[1]): path for path in paths}


def events_identity(events: Any, connection: Any) -> EventsIdentity:
    """Identity of the rows of an ibis table of events."""
    columns = ("user_id", "event_timestamp", "scene", "behavior_id", "item_key")
    hashed = ibis.struct({name: events[name] for name in columns}).hash()
    row = connection.to_pyarrow(
        events.agg(num=events.count(), hash=hashed.bit_xor(), last=events.event_timestamp.max())
    ).to_pylist()[0]
    return EventsIdentity(
        num_events=row["num"], events_hash=row["hash"] or 0, last_event=row["last"]
    )


def settings_hash(schema: pa.Schema, settings: dict[str, Any]) -> str:
    """Hash of columns and of JSON values, whatever the order of their keys."""
    columns = [(column.name, str(column.type)) for column in schema]
    content = json.dumps([columns, settings], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def file_fingerprint(path: Path) -> str:
    """Hash of a file's bytes: xxh3, 128 bits."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return str(digest.hexdigest())


@contextmanager
def engine(home: Home, what: str, *, threads: int) -> Iterator[Any]:
    """Open DuckDB through ibis: streaming, bounded in memory, times in UTC."""
    spill = home.root / f".spill-{what}"
    shutil.rmtree(spill, ignore_errors=True)  # of a run that was killed
    connection = ibis.duckdb.connect(
        threads=threads,
        memory_limit=MEMORY_LIMIT,
        preserve_insertion_order=False,
        temp_directory=str(spill),
    )
    connection.raw_sql("SET enable_progress_bar = false")  # it would go to stdout
    try:
        yield connection
    finally:
        connection.disconnect()
        shutil.rmtree(spill, ignore_errors=True)


def write_rows(
    connection: Any, rows: Any, schema: pa.Schema, path: Path, *, created_later_us: int = 0
) -> int:
    """Stream an ibis table into a parquet file; ``created_timestamp`` is added.

    Args:
        connection: Of the table.
        rows: The table.
        schema: Columns of the file.
        path: The file.
        created_later_us: Microseconds by which ``created_timestamp`` is later than
            ``event_timestamp``: these rows count instead of others of the same time.

    Returns:
        The number of rows.
    """
    created = rows.event_timestamp
    if created_later_us:
        created += ibis.interval(microseconds=created_later_us)
    columns = {name: created if name == CREATED_TIMESTAMP else rows[name] for name in schema.names}
    connection.to_parquet(
        rows.select(**columns), path, compression="zstd", row_group_size=ROW_GROUP_SIZE
    )
    metadata = pq.read_metadata(path)
    written = metadata.schema.to_arrow_schema()
    assert written.names == schema.names, written.names
    for field, expected in zip(written, schema, strict=True):
        assert field.type == expected.type, f"{field} was written, expected {expected}"
    return int(metadata.num_rows)


def _new_rows(old: BucketState | None, new: BucketState) -> int:
    """Rows of the files that were written between two states of a bucket."""
    kept = old.files if old is not None and len(new.files) > len(old.files) else {}
    return sum(rows for name, rows in new.files.items() if name not in kept)


def view_settings(manifest: DataManifest, **more: Any) -> dict[str, Any]:
    """Return the settings on which every view of a data set depends, and ``more``."""
    return {
        "scenes": manifest.scenes,
        "num_buckets": manifest.num_buckets,
        "availability_delay_us": manifest.availability_delay_us,
        **more,
    }
