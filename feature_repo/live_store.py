"""The stores of a home as they are now: what doctor and status look at.

Nothing is changed, but that live events become part of history, as before every reading of it.
"""

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from feast import FeatureStore, FeatureView

from feature_repo.home import Home
from feature_repo.live_offline import LiveOffline
from feature_repo.manifest import DataManifest, load_manifest
from feature_repo.materialize import copied_views
from feature_repo.offline import OfflineStore, open_offline
from feature_repo.online import OnlineWriter, open_writer
from feature_repo.online_copy import CopyState
from feature_repo.profiles import open_store

_GIB = 2**30


@dataclass
class LiveStore:
    """The stores of a profile, each opened when it is first asked for.

    Args:
        home: Whose.
        profile: Which.
        store: Feast's store.
        min_free_bytes: Free space on the home's disk below which something is wrong.
    """

    home: Home
    profile: str
    store: FeatureStore
    min_free_bytes: int = _GIB

    @classmethod
    def open(cls, home: Home, profile: str) -> "LiveStore":
        """Open the registry.

        Raises:
            MissingStepError: If nothing was ingested.
            StoreError: If it cannot be reached.
        """
        load_manifest(home)
        return cls(home, profile, open_store(home, profile))

    @cached_property
    def manifest(self) -> DataManifest:
        """Of the last ingest."""
        return load_manifest(self.home)

    @cached_property
    def now(self) -> datetime:
        """The moment at which a request would be answered, UTC."""
        return self.manifest.now()

    @cached_property
    def views(self) -> tuple[FeatureView, ...]:
        """What the registry knows, by name."""
        return tuple(sorted(self.store.list_feature_views(), key=lambda view: str(view.name)))

    @cached_property
    def offline(self) -> OfflineStore:
        """Where historical features are."""
        LiveOffline(self.home, self.profile, self.store).catch_up()
        return open_offline(self.store)

    @cached_property
    def parts(self) -> dict[str, dict[str, list[int]]]:
        """View -> its parts offline; see :meth:`OfflineStore.parts`."""
        return {view.name: self.offline.parts(view.name) for view in self.views}

    @property
    def held(self) -> list[FeatureView]:
        """The views that have rows offline."""
        return [view for view in self.views if self.parts[view.name]]

    @cached_property
    def writer(self) -> OnlineWriter:
        """The online store; only counted and looked at."""
        return open_writer(self.store)

    @cached_property
    def copies(self) -> dict[str, CopyState]:
        """View -> how far it was copied online.

        Raises:
            StoreError: If another version wrote the record.
        """
        return copied_views(self.home, self.profile)
