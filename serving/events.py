"""New behaviours of users, from outside: checked, kept, and in the user's next ranking.

Every event is in the journal first (:mod:`feature_repo.live_events`), then in the online store,
then it is answered for. The offline store follows the journal whenever history is read
(:mod:`feature_repo.live_offline`), and so does ingest: training sees what serving saw.
"""

import re
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from filelock import Timeout

from encoders.live_texts import LiveTexts
from feature_repo.artifact import current_run, load_run_manifest
from feature_repo.behavior import behavior_id, normalize
from feature_repo.catalog import Catalog
from feature_repo.command import full_disk
from feature_repo.errors import LongtrailError, StoreError
from feature_repo.home import Home
from feature_repo.live_events import EventJournal
from feature_repo.live_rows import JournalEvent, micros
from feature_repo.manifest import DataManifest, load_manifest
from feature_repo.online import open_writer
from feature_repo.profiles import open_store
from feature_repo.push import LivePush, read_tables
from feature_repo.validate import BROKEN_TEXT
from feature_repo.version_names import encoder_view

MAX_SKEW = timedelta(seconds=60)
"""By which a caller's clock may be ahead; such events count as of now."""
MAX_ID_LENGTH = 256
MAX_DELAY_US = 1000
"""Of the data set's availability delay: accepting takes longer, so that nobody is served an event
before the moment from which history knows it."""
_EARLIEST = datetime(1970, 1, 2, tzinfo=UTC)
"""Stores take the epoch for a missing time."""
_CONTROL = re.compile("[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class LiveEvent:
    """A behaviour that just happened.

    Args:
        event_id: The caller's own; the same id again is the same event and changes nothing.
        user_id: Who.
        scene: One of the data set's.
        text: As in the data; the item's latest title where None.
        item_id: What it is about, if anything.
        event_timestamp: When, with time zone; None = now.
    """

    event_id: str
    user_id: str
    scene: str
    text: str | None = None
    item_id: str | None = None
    event_timestamp: datetime | None = None


@dataclass(frozen=True)
class EventReceipt:
    """What became of a batch of events.

    Args:
        accepted: Events that are now durable and in the online store.
        duplicates: Events that were accepted before; nothing changed.
        rejected: Place in the batch and a sentence why, of each event that was not taken.
    """

    accepted: int
    duplicates: int
    rejected: tuple[tuple[int, str], ...]


class EventService:
    """Takes live events; one instance serves many threads, any number of processes share a home.

    Args:
        home: Whose tables say what an event may be.
        journal: Keeps events.
        push: Writes users' rows online.
        texts: Gives unseen texts their vectors.
    """

    def __init__(self, home: Home, journal: EventJournal, push: LivePush, texts: LiveTexts) -> None:
        self._journal = journal
        self._push = push
        self._texts = texts
        self.encoder_fingerprint = texts.fingerprint
        """Of the vectors that unseen texts get: a run of another encoder wants another service."""
        self._rules = _Rules(home)

    @classmethod
    def open(cls, home: Home, profile: str, run: str | None = None) -> "EventService":
        """Open for a run's encoder, and apply what a process that was killed had not.

        Args:
            home: Where the run and its tables are.
            profile: Whose stores.
            run: Name of the run that is served; None for the current one.

        Raises:
            MissingStepError: If a step before has not been run.
            StoreError: If a store does not answer.
            LongtrailError: If the data set's features become readable too late for live events.
        """
        manifest = load_manifest(home)
        if manifest.availability_delay_us > MAX_DELAY_US:
            raise LongtrailError(
                f"live events need an availability_delay_s of at most {MAX_DELAY_US / 1e6:g}, got "
                f"{manifest.availability_delay_us / 1e6:g}: serving would see them before training "
                "does; lower it in the data set file and ingest again"
            )
        fingerprint = load_run_manifest(home, run or current_run(home)).encoder_fingerprint
        store = open_store(home, profile)
        journal = EventJournal.open(home, profile, manifest.dataset)
        push = LivePush(home, store, open_writer(store), journal)
        view = encoder_view(fingerprint)
        texts = LiveTexts.open(home, fingerprint, lambda rows: push.push_vectors(view, rows))
        push.recover()
        return cls(home, journal, push, texts)

    def warm_up(self) -> None:
        """Load the encoder's model, so that the first unseen text takes milliseconds.

        Raises:
            EncoderError: If it cannot be loaded.
        """
        self._texts.warm_up()

    def close(self) -> None:
        """Close the journal's connections."""
        self._journal.close()

    def accept(self, events: Sequence[LiveEvent]) -> EventReceipt:
        """Take events: when this returns, those accepted are durable and in the online store.

        Raises:
            StoreError: If a store does not answer. Send the same events again: each is taken once,
                and those that were kept are applied then.
            EncoderError: If the encoder of unseen texts cannot be loaded.
        """
        try:
            return self._accept(events)
        except Timeout as error:
            raise StoreError(
                f"another process has held {error.lock_file} for too long; is it stopped? End it, "
                "then send the events again: each is taken once"
            ) from error
        except (OSError, sqlite3.Error) as error:
            if (reason := full_disk(error)) is None:
                raise
            raise StoreError(
                f"a disk is full ({reason}): free some space, then send the events again: each is "
                "taken once"
            ) from error

    def _accept(self, events: Sequence[LiveEvent]) -> EventReceipt:
        taken, rejected = self._rules.check(events)
        failed = self._texts.add(_first_times(taken.values()))
        for place, event in list(taken.items()):
            if event.text in failed:
                rejected[place] = failed[event.text]
                del taken[place]
        # Of two with one id in a batch the first is taken.
        distinct = {event.event_id: event for event in reversed(taken.values())}
        new = self._journal.add(list(reversed(distinct.values())))
        users = {distinct[event_id].user_id for event_id in new}
        if known := [event_id for event_id in distinct if event_id not in new]:
            # Some of them may be left from a kill, or from a store that was away.
            users.update(self._journal.pending_users(known))
        self._push.push(sorted(users))
        return EventReceipt(
            accepted=len(new),
            duplicates=len(taken) - len(new),
            rejected=tuple(sorted(rejected.items())),
        )


class _Rules:
    """What ingest asks of an event, asked of one event at a time.

    Args:
        home: Whose tables; read again when an ingest has replaced them.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self._lock = threading.Lock()
        self._stamp = home.manifest.stat().st_mtime_ns
        self._catalog = Catalog.load(home)

    def _current(self) -> tuple[DataManifest, Catalog]:
        stamp = self._home.manifest.stat().st_mtime_ns
        manifest = load_manifest(self._home)
        with self._lock:
            if stamp != self._stamp:
                self._catalog = Catalog.load(self._home)
                self._stamp = stamp
        return manifest, self._catalog

    def check(self, events: Sequence[LiveEvent]) -> tuple[dict[int, JournalEvent], dict[int, str]]:
        """Place -> the event as the journal keeps it, and place -> why it cannot be used."""
        manifest, catalog = read_tables(self._current)
        catalog.refresh()
        now = manifest.now()
        taken: dict[int, JournalEvent] = {}
        rejected: dict[int, str] = {}
        new_texts: dict[int, str] = {}
        for place, event in enumerate(events):
            # Events without a time keep their order: no two of a batch have the same moment.
            default = now + timedelta(microseconds=place)
            try:
                usable = _checked(event, manifest, catalog, now=now, default=default)
                known = catalog.text_by_id.get(usable.behavior_id, usable.text)
                known = new_texts.setdefault(usable.behavior_id, known)
                if known != usable.text:
                    raise _UnusableError(
                        "text has the same 63-bit id as another text; change a word"
                    )
            except _UnusableError as reason:
                rejected[place] = str(reason)
            else:
                taken[place] = usable
        return taken, rejected


class _UnusableError(ValueError):
    """Why an event is not taken; a sentence that repeats nothing of the event."""


def _checked(
    event: LiveEvent, manifest: DataManifest, catalog: Catalog, *, now: datetime, default: datetime
) -> JournalEvent:
    """An event as the tables would have it.

    Raises:
        _UnusableError: If it cannot be used.
    """
    event_id = _identifier(event.event_id, "event_id")
    user_id = _identifier(event.user_id, "user_id")
    item_id = _identifier(event.item_id, "item_id") if event.item_id is not None else None
    if event.scene not in manifest.scenes:
        raise _UnusableError(f"scene is unknown; this data set has {', '.join(manifest.scenes)}")
    raw = event.text
    if raw is None:
        raw = catalog.title(item_id) if item_id is not None else None
    if raw is None:
        raise _UnusableError(
            "text is missing, and item_id names no item whose title could stand for it"
        )
    if not _is_unicode(raw) or BROKEN_TEXT.search(raw):
        raise _UnusableError("text has a broken encoding (control or replacement characters)")
    text = normalize(raw, lowercase=manifest.lowercase)
    if not text:
        raise _UnusableError("text is empty")
    if len(text) > manifest.max_text_length:
        raise _UnusableError(f"text is longer than {manifest.max_text_length} characters")
    return JournalEvent(
        event_id=event_id,
        user_id=user_id,
        scene=event.scene,
        text=text,
        behavior_id=behavior_id(text),
        item_id=item_id,
        time=micros(_moment(event.event_timestamp, now, default)),
    )


def _moment(given: datetime | None, now: datetime, default: datetime) -> datetime:
    if given is None:
        return default
    if given.tzinfo is None:
        raise _UnusableError("event_timestamp has no time zone; end it with Z for UTC")
    if given < _EARLIEST:
        raise _UnusableError("event_timestamp is before 1970-01-02")
    if given > now + MAX_SKEW:
        raise _UnusableError(
            f"event_timestamp is in the future: for this data set it is {now:%Y-%m-%dT%H:%M:%SZ}; "
            "leave it out for now"
        )
    return min(given, default)


def _identifier(value: str, name: str) -> str:
    stripped = value.strip()
    if not stripped:
        raise _UnusableError(f"{name} is missing")
    if len(stripped) > MAX_ID_LENGTH:
        raise _UnusableError(f"{name} is longer than {MAX_ID_LENGTH} characters")
    if not _is_unicode(stripped) or _CONTROL.search(stripped):
        raise _UnusableError(f"{name} has a broken encoding or control characters")
    return stripped


def _is_unicode(text: str) -> bool:
    """Whether every character can be stored: half a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _first_times(events: Iterable[JournalEvent]) -> dict[str, int]:
    """Text -> time of its first event."""
    times: dict[str, int] = {}
    for event in events:
        times[event.text] = min(event.time, times.get(event.text, event.time))
    return times
