"""Live events in the offline store: a part of ``user_sequences`` that is brought up to the journal.

``live.parquet`` lies beside the files of the batch. It holds, for every user with events that the
last ``longtrail sequences`` has not seen, the rows from the first of these events on, made by the
same expressions. Of rows with equal times the one created last counts, and these are created a
microsecond later. So it is a function of tables and journal: it is written as a whole, just before
history is read (:func:`catch_up`), and a kill loses nothing.

The copy to the online store passes over it: its newest rows are there since the events came.
"""

import ibis
import pyarrow as pa
import pyarrow.compute as pc
from feast import FeatureStore
from filelock import FileLock
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from feature_repo import sequences
from feature_repo.errors import StoreError
from feature_repo.feature_files import engine, write_rows
from feature_repo.fields import EVENT_TIMESTAMP, arrow_schema
from feature_repo.home import Home, complete_file
from feature_repo.live_events import EventJournal
from feature_repo.manifest import DataManifest, Document, load_manifest
from feature_repo.moments import moment_of
from feature_repo.offline_files import LIVE_PART
from feature_repo.postgres_load import load_tables
from feature_repo.postgres_session import PATIENCE_S, Database
from feature_repo.publish import FILES_PROFILE
from feature_repo.push import event_table, stored_events

_LOCK_TIMEOUT_S = 600.0
"""Of another process that writes the same rows."""


class LiveState(Document):
    """What ``live.parquet`` was made of; lies beside it as ``live.json``."""

    tables: str
    """Fingerprint of the canonical tables."""
    built: int
    """Number of the last event that the batch's files hold."""
    sequence: int
    """Number of the last event that it holds."""


class LiveOffline:
    """Keeps the offline store of a profile up to its journal.

    Args:
        home: Where tables and features are.
        profile: Whose journal.
        store: Feast's store of the profile.
    """

    def __init__(self, home: Home, profile: str, store: FeatureStore) -> None:
        self._home = home
        self._profile = profile
        self._store = store
        self._journal: EventJournal | None = None
        self._exists = False
        self._is_loaded = profile == FILES_PROFILE

    def journal(self) -> EventJournal | None:
        """The journal; None where no live event was ever taken."""
        if not self._home.manifest.exists():
            return None
        if self._journal is None:
            dataset = load_manifest(self._home).dataset
            self._journal = EventJournal.connect(self._home, self._profile, dataset, self._store)
        self._exists = self._exists or self._journal.exists()
        return self._journal if self._exists else None

    def catch_up(self) -> None:
        """Make every accepted event part of the offline store; milliseconds where nothing is new.

        A server that restarts meanwhile is waited for, as by every reading.

        Raises:
            StoreError: If a store fails.
        """
        Retrying(
            retry=retry_if_exception_type(StoreError),
            stop=stop_after_delay(0 if self._profile == FILES_PROFILE else PATIENCE_S),
            wait=wait_exponential(multiplier=0.1, max=1),
            reraise=True,
        )(self._catch_up)

    def _catch_up(self) -> None:
        journal = self.journal()
        if journal is None:
            return
        if write_live_rows(self._home, journal):
            self._is_loaded = self._profile == FILES_PROFILE
        if not self._is_loaded:  # nor was it, as far as this process knows
            load_tables(self._home, Database(self._store.config.offline_store))
            self._is_loaded = True


def write_live_rows(home: Home, journal: EventJournal, *, built: int | None = None) -> bool:
    """Bring ``live.parquet`` up to the journal; whether anything changed.

    Args:
        home: Where tables and features are.
        journal: Of the profile.
        built: Number of the last event that the batch's files now hold; None: as before.
    """
    folder = home.view(sequences.VIEW)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(home.root / ".live-offline.lock", timeout=_LOCK_TIMEOUT_S):
        manifest = load_manifest(home)
        before = _state(home)
        if built is None:
            built = before.built if before else 0
        state = LiveState(
            tables=manifest.source_fingerprint, built=built, sequence=journal.last_sequence()
        )
        if state == before:
            return False
        users = journal.users_since(built)
        if users:
            _write(home, manifest, journal, users, built)
        else:
            (folder / LIVE_PART).unlink(missing_ok=True)
        state.save(folder / "live.json")
    return True


def _state(home: Home) -> LiveState | None:
    path = home.view(sequences.VIEW) / "live.json"
    if not path.exists():
        return None
    try:
        return LiveState.load(path, made_by="longtrail sequences")
    except StoreError:  # of another version: made anew
        return None


def _write(
    home: Home, manifest: DataManifest, journal: EventJournal, users: list[str], built: int
) -> None:
    """Write the rows of users from their first event behind ``built`` on."""
    live = event_table(journal.events(users))
    first = pc.min(event_table(journal.events(users, after=built))[EVENT_TIMESTAMP])
    _, stored = stored_events(home, users)
    whole = pa.concat_tables([stored, live])
    events = whole.group_by(whole.column_names).aggregate([])  # each once
    path = home.view(sequences.VIEW) / LIVE_PART
    with engine(home, "live", threads=1) as connection, complete_file(path) as part:
        rows = sequences.sequence_rows(
            ibis.memtable(events),
            manifest.scenes,
            length=manifest.sequence_length,
            delay_us=manifest.availability_delay_us,
            after=moment_of(first.cast(pa.int64()).as_py() - 1),
        )
        schema = arrow_schema("user_id", sequences.fields(manifest))
        write_rows(connection, rows, schema, part, created_later_us=1)
