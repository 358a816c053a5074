"""Live events for whichever run serves: another encoder gives new texts other vectors."""

import logging
import threading
from collections.abc import Callable, Sequence

from feature_repo.artifact import ArtifactManifest
from feature_repo.errors import EncoderError, LongtrailError, StoreError
from feature_repo.home import Home
from feature_repo.manifest import load_manifest
from feature_repo.push import read_tables
from serving.breaker import Breaker
from serving.deployment import NotLoadedError
from serving.event_rules import LiveEvent
from serving.events import EventReceipt, EventService, check_delay

_log = logging.getLogger(__name__)


class FollowingEvents:
    """Takes live events with the encoder of the run that serves; safe for threads.

    What it needs is opened at once where that works, else with the events that come. While stores
    fail time after time they are asked seldom, so that callers who are told to come again are told
    so at once (:class:`serving.breaker.Breaker`).

    Args:
        home: Whose tables and runs.
        profile: Whose stores.
        serving: Tells the manifest of the run that serves now; raises :class:`NotLoadedError` while
            none does.
        breaker: Around all that takes events; None for one with the usual numbers.

    Raises:
        LongtrailError: If the data set cannot have live events, whenever it is asked.
    """

    def __init__(
        self,
        home: Home,
        profile: str,
        serving: Callable[[], ArtifactManifest],
        *,
        breaker: Breaker | None = None,
    ) -> None:
        check_delay(read_tables(lambda: load_manifest(home)))
        self._home = home
        self._profile = profile
        self._serving = serving
        self._breaker = breaker or Breaker("what takes live events")
        self._lock = threading.Lock()
        self._service: EventService | None = None
        try:
            self._current()
        except (StoreError, NotLoadedError) as error:
            _log.warning("no live events are taken yet: %s", error)

    def accept(self, events: Sequence[LiveEvent]) -> EventReceipt:
        """Take events; see :meth:`EventService.accept`.

        Raises:
            StoreError: If a store does not answer, or something else is not there yet.
            CircuitOpenError: If that was so just now, again and again.
            EncoderError: If the encoder of unseen texts cannot be loaded.
            NotLoadedError: If no run serves yet, so that nobody knows which encoder it would be.
        """
        # A thousand unseen texts take the encoder a while.
        return self._breaker.guard(lambda: self._current().accept(events), may_be_slow=True)

    def close(self) -> None:
        """Close the journal's connections."""
        if self._service is not None:
            self._service.close()

    def _current(self) -> EventService:
        """The service of the run's encoder, opened where it is not.

        Raises:
            StoreError: If it cannot be opened now.
            NotLoadedError: If no run serves yet.
        """
        service = self._service
        if service is None or self._serving().encoder_fingerprint != service.encoder_fingerprint:
            with self._lock:
                service = self._service
                wanted = self._serving().encoder_fingerprint
                if service is None or wanted != service.encoder_fingerprint:
                    # The old one is not closed: another thread may be using it. It goes with the
                    # last of them.
                    self._service = service = self._open()
        return service

    def _open(self) -> EventService:
        try:
            service = EventService.open(self._home, self._profile, self._serving().run)
        except StoreError:
            raise
        except LongtrailError as error:  # a step that has not been run yet can still be
            raise StoreError(f"live events cannot be taken yet: {error}") from error
        try:
            service.warm_up()
        except EncoderError as error:
            # Events of texts that are known need no encoder.
            _log.warning("events of unseen texts are refused: %s", error)
        return service
