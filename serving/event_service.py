"""Live events for whichever run serves: another encoder gives new texts other vectors."""

import logging
import threading
from collections.abc import Callable, Sequence

from feature_repo.artifact import ArtifactManifest
from feature_repo.errors import EncoderError
from feature_repo.home import Home
from serving.events import EventReceipt, EventService, LiveEvent

_log = logging.getLogger(__name__)


class FollowingEvents:
    """Takes live events with the encoder of the run that serves; safe for threads.

    Args:
        home: Whose tables and runs.
        profile: Whose stores.
        serving: Tells the manifest of the run that serves now.

    Raises:
        LongtrailError: If the data set cannot have live events, or a store does not answer.
    """

    def __init__(self, home: Home, profile: str, serving: Callable[[], ArtifactManifest]) -> None:
        self._home = home
        self._profile = profile
        self._serving = serving
        self._lock = threading.Lock()
        self._service = self._open()

    def accept(self, events: Sequence[LiveEvent]) -> EventReceipt:
        """Take events; see :meth:`EventService.accept`.

        Raises:
            StoreError: If a store does not answer.
            EncoderError: If the encoder of unseen texts cannot be loaded.
        """
        return self._current().accept(events)

    def close(self) -> None:
        """Close the journal's connections."""
        self._service.close()

    def _current(self) -> EventService:
        if self._serving().encoder_fingerprint != self._service.encoder_fingerprint:
            with self._lock:
                if self._serving().encoder_fingerprint != self._service.encoder_fingerprint:
                    # The old one is not closed: another thread may be using it. It goes with the
                    # last of them.
                    self._service = self._open()
        return self._service

    def _open(self) -> EventService:
        service = EventService.open(self._home, self._profile, self._serving().run)
        try:
            service.warm_up()
        except EncoderError as error:
            # Events of texts that are known need no encoder.
            _log.warning("events of unseen texts are refused: %s", error)
        return service
