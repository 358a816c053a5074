"""What an event must be to be taken: what ingest asks of its rows, asked of one event."""

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from feature_repo.behavior import behavior_id, normalize
from feature_repo.catalog import Catalog
from feature_repo.errors import StoreError
from feature_repo.home import Home
from feature_repo.live_rows import JournalEvent
from feature_repo.manifest import DataManifest, load_manifest
from feature_repo.moments import micros
from feature_repo.push import read_tables
from feature_repo.validate import BROKEN_TEXT

MAX_SKEW = timedelta(seconds=60)
"""By which a caller's clock may be ahead; such events count as of now."""
MAX_ID_LENGTH = 256
CONTROL_CHARACTERS = r"\x00-\x1f\x7f-\x9f"
"""In no id of whoever asks; for a class of a regular expression."""
_EARLIEST = datetime(1970, 1, 2, tzinfo=UTC)
"""Stores take the epoch for a missing time."""
_CONTROL = re.compile(f"[{CONTROL_CHARACTERS}]")


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


class EventRules:
    """What ingest asks of an event, asked of one event at a time.

    Args:
        home: Whose tables; read again when an ingest has replaced them.
        dataset: Name of the data set whose events they are.
    """

    def __init__(self, home: Home, dataset: str) -> None:
        self._home = home
        self._dataset = dataset
        self._lock = threading.Lock()
        self._stamp, self._catalog = read_tables(
            lambda: (home.manifest.stat().st_mtime_ns, Catalog.load(home))
        )

    def _current(self) -> tuple[DataManifest, Catalog]:
        stamp = self._home.manifest.stat().st_mtime_ns
        manifest = load_manifest(self._home)
        with self._lock:
            if stamp != self._stamp:
                self._catalog = Catalog.load(self._home)
                self._stamp = stamp
        return manifest, self._catalog

    def check(self, events: Sequence[LiveEvent]) -> tuple[dict[int, JournalEvent], dict[int, str]]:
        """Place -> the event as the journal keeps it, and place -> why it cannot be used.

        Raises:
            StoreError: If the home's tables are of another data set by now.
        """
        manifest, catalog = read_tables(self._current)
        if manifest.dataset != self._dataset:
            raise StoreError(
                f"the home holds data set {manifest.dataset!r} since an ingest, and this service "
                f"takes events of {self._dataset!r}: ingest that one again, or start the service "
                "again"
            )
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
    stripped = normalized_id(value)
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


def normalized_id(value: str) -> str:
    """The id as the stores have it: two that differ in spaces around them are one."""
    return value.strip()
