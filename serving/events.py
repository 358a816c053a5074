"""New behaviours of users, from outside: checked, kept, and in the user's next ranking.

Every event is in the journal first (:mod:`feature_repo.live_events`), then in the online store,
then it is answered for. The offline store follows the journal whenever history is read
(:mod:`feature_repo.live_offline`), and so does ingest: training sees what serving saw.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from filelock import Timeout

from encoders.live_texts import LiveTexts
from feature_repo.artifact import current_run, load_run_manifest
from feature_repo.command import full_disk
from feature_repo.errors import LongtrailError, StoreError
from feature_repo.home import Home
from feature_repo.live_events import EventJournal
from feature_repo.live_rows import JournalEvent
from feature_repo.manifest import DataManifest, load_manifest
from feature_repo.online import open_writer
from feature_repo.profiles import open_store
from feature_repo.push import LivePush, read_tables
from feature_repo.version_names import encoder_view
from serving.event_rules import EventRules, LiveEvent

MAX_DELAY_US = 1000
"""Of the data set's availability delay: accepting takes longer, so that nobody is served an event
before the moment from which history knows it."""


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
        self._rules = EventRules(home, journal.dataset)

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
        manifest = read_tables(lambda: load_manifest(home))
        check_delay(manifest)
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


def check_delay(manifest: DataManifest) -> None:
    """Refuse a data set that can have no live events at all.

    Raises:
        LongtrailError: If its features become readable too late for them.
    """
    if manifest.availability_delay_us > MAX_DELAY_US:
        raise LongtrailError(
            f"live events need an availability_delay_s of at most {MAX_DELAY_US / 1e6:g}, got "
            f"{manifest.availability_delay_us / 1e6:g}: serving would see them before training "
            "does; lower it in the data set file and ingest again"
        )


def _first_times(events: Iterable[JournalEvent]) -> dict[str, int]:
    """Text -> time of its first event."""
    times: dict[str, int] = {}
    for event in events:
        times[event.text] = min(event.time, times.get(event.text, event.time))
    return times
