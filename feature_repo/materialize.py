"""Thin over Feast: register the definitions, copy the latest features to the online store.

Feast's incremental run starts where the last one ended, by event time. A row that arrives late, or
the vector of a text seen long ago, lies before that and would never be copied. So the parts that
were copied are remembered (:mod:`feature_repo.online_copy`), and a run starts at the oldest row of
those that are new.
"""

import contextlib
import io
import logging
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from feast import FeatureView
from feast.repo_operations import apply_total_with_repo_instance

from feature_repo import sequences
from feature_repo.definitions import define
from feature_repo.errors import MissingStepError, StoreError
from feature_repo.home import Home
from feature_repo.live_offline import LiveOffline
from feature_repo.manifest import Document, load_manifest
from feature_repo.offline import open_offline
from feature_repo.online import OnlineWriter, open_writer
from feature_repo.online_copy import CopyState, MaterializedView, ViewCopy
from feature_repo.profiles import open_store
from feature_repo.progress import ProgressBars, no_bars
from feature_repo.push import LivePush

logger = logging.getLogger(__name__)


class Materialized(Document):
    """What was copied to the online store of a profile."""

    views: dict[str, CopyState]
    prune: bool = False
    """Values of features that are applied no more may lie online."""
    evicted: dict[str, int] | None = None
    """:meth:`feature_repo.online.OnlineWriter.evicted` when these views were all there; None where
    nobody looked."""

    def is_whole(self, evicted: Mapping[str, int]) -> bool:
        """Whether the online store has thrown away nothing since."""
        before = self.evicted
        return before is None or all(num <= before.get(key, 0) for key, num in evicted.items())


def copied_views(home: Home, profile: str) -> dict[str, CopyState]:
    """View -> how far it was copied to the online store of a profile; none before the first copy.

    Raises:
        StoreError: If another version wrote the record.
    """
    return dict(_load(home, profile).views)


def _load(home: Home, profile: str) -> Materialized:
    record = home.materialized(profile)
    if not record.exists():
        return Materialized(views={})
    return Materialized.load(record, made_by="longtrail materialize")


@dataclass(frozen=True)
class ApplySummary:
    """What the registry holds after an apply."""

    entities: tuple[str, ...]
    views: tuple[str, ...]
    services: tuple[str, ...]
    removed: tuple[str, ...]


def apply(home: Home, profile: str) -> ApplySummary:
    """Register the home's definitions as `feast apply` does; what is defined no more is removed."""
    store = open_store(home, profile)
    definitions = define(home, store.config.offline_store.type)
    with home.lock("registry"), feast_in_log():
        before = {
            thing.name for thing in (*store.list_feature_views(), *store.list_feature_services())
        }
        apply_total_with_repo_instance(
            store, store.project, store.registry, definitions.contents(store.project), True
        )
    views = tuple(view.name for view in definitions.views)
    services = tuple(service.name for service in definitions.services)
    return ApplySummary(
        tuple(entity.name for entity in definitions.entities),
        views,
        services,
        tuple(sorted(before - {*views, *services})),
    )


def materialize(
    home: Home,
    profile: str,
    *,
    full: bool = False,
    num_workers: int = 1,
    bars: ProgressBars = no_bars,
) -> list[MaterializedView]:
    """Copy each key's latest features, as of now, to the online store.

    A run that was killed goes on behind its last finished window. Keys that are gone offline, rows
    older than their view's time to live, and features that are applied no more leave the online
    store. Users whose live events the batch's files lack are pushed once more after their view: the
    copy, and one that was killed before, knows them as they were without.

    Args:
        home: Where the record of what was copied is.
        profile: Which stores.
        full: Copy everything again, over what is online, which can be read meanwhile.
        num_workers: Threads that encode and write.
        bars: Opens a progress bar for a view; receives its rows.

    Raises:
        MissingStepError: If nothing was built or applied.
        StoreError: If a store fails, or another process copies to the same online store.
    """
    load_manifest(home)  # before any store is made
    store = open_store(home, profile)
    live = LiveOffline(home, profile, store)
    live.catch_up()
    manifest = load_manifest(home)
    end = manifest.now()
    offline = open_offline(store)
    record = home.materialized(profile)
    with home.lock(f"online-{profile}"), feast_in_log(), offline.held():
        try:
            known = _load(home, profile)
        except StoreError as error:  # of another version: what is online is unknown
            logger.info("%s", error)
            known, full = Materialized(views={}), True
        views = {view.name: view for view in store.list_feature_views()}
        held = {name: bool(offline.parts(name)) for name in views}
        if not any(held.values()):
            raise MissingStepError(
                f"no applied feature view of {home.root} has features: run `longtrail encode`, "
                "`longtrail sequences` and `longtrail apply` first"
            )
        prune = full or known.prune or _has_removed(known.views, views)
        writer = open_writer(store)
        done = []
        with writer.hold(f"{socket.gethostname()}:{record}"):
            evicted = writer.evicted()
            if not known.is_whole(evicted):
                logger.warning("the online store has thrown rows away: all views are copied again")
                known, full, prune = Materialized(views={}, evicted={}), True, True
            begun = known.model_copy(update={"prune": prune, "evicted": evicted})
            if begun != known:
                begun.save(record)
            known = begun
            states = {name: state for name, state in known.views.items() if name in views}
            for name, view in views.items():
                if not held[name] and name not in states:
                    continue

                def save(state: CopyState, name: str = name) -> None:
                    states[name] = state
                    known.model_copy(update={"views": states}).save(record)

                with bars(name) as progress:
                    copy = ViewCopy(
                        store, offline, writer, view, end, manifest.now, num_workers, save, progress
                    )
                    done.append(copy.run(states.get(name), full=full))
                if name == sequences.VIEW and (journal := live.journal()):
                    behind = load_manifest(home).live_sequence
                    LivePush(home, store, writer, journal).push(journal.users_since(behind))
            if prune:
                _prune(writer)
                known.model_copy(update={"views": states, "prune": False}).save(record)
            if not known.is_whole(writer.evicted()):
                raise StoreError(
                    "the online store threw features away while they were copied: it is full "
                    "(maxmemory) and its maxmemory-policy lets it; set noeviction, give it more "
                    "memory or remove views, then run this again, which copies everything"
                )
    return done


def _has_removed(copied: Mapping[str, CopyState], views: Mapping[str, FeatureView]) -> bool:
    """Whether something was copied that is applied no more: a view, or a feature of one."""
    for name, state in copied.items():
        names = {feature.name for feature in views[name].features} if name in views else set()
        begun = state.unfinished.features if state.unfinished else {}
        if (state.features.keys() | begun.keys()) - names:
            return True
    return False


def _prune(writer: OnlineWriter) -> None:
    if num_values := writer.prune():
        logger.info("%d values of features that are applied no more were deleted", num_values)


def prune_online(home: Home, profile: str) -> None:
    """Delete the online values of features and views that are applied no more.

    Args:
        home: Whose definitions are applied.
        profile: Which stores.

    Raises:
        StoreError: If the store fails, or another process copies to it.
    """
    store = open_store(home, profile)
    record = home.materialized(profile)
    views = {view.name: view for view in store.list_feature_views()}
    with home.lock(f"online-{profile}"), feast_in_log():
        writer = open_writer(store)
        with writer.hold(f"{socket.gethostname()}:{record}"):
            known = _load(home, profile)
            if _has_removed(known.views, views):  # one that comes back must be copied anew
                kept = {
                    name: _narrowed(state, views[name])
                    for name, state in known.views.items()
                    if name in views
                }
                known.model_copy(update={"views": kept, "prune": True}).save(record)
            _prune(writer)


def _narrowed(state: CopyState, view: FeatureView) -> CopyState:
    """The state of a copy without the features that are applied no more."""
    names = {feature.name for feature in view.features}
    features = {name: kind for name, kind in state.features.items() if name in names}
    return state.model_copy(update={"features": features})


def remove_online(home: Home, profile: str, views: Iterable[str], *, dry_run: bool = False) -> int:
    """Delete the online rows of applied views, and the record that they were copied.

    Args:
        home: Where the record of what was copied is.
        profile: Which stores.
        views: Names of the views; those that are not applied are passed over.
        dry_run: Only count.

    Returns:
        The number of rows.

    Raises:
        StoreError: If the store fails, or another process copies to it.
    """
    store = open_store(home, profile)
    record = home.materialized(profile)
    wanted = set(views)
    chosen = [view for view in store.list_feature_views() if view.name in wanted]
    if not chosen:
        return 0
    with home.lock(f"online-{profile}"), feast_in_log():
        writer = open_writer(store)
        with writer.hold(f"{socket.gethostname()}:{record}"):
            num_rows = sum(writer.count(view) for view in chosen)
            if dry_run:
                return num_rows
            for view in chosen:
                writer.clear(view)
                writer.mark(view.name, "")
            known = _load(home, profile)
            if known.views:
                kept = {name: state for name, state in known.views.items() if name not in wanted}
                known.model_copy(update={"views": kept}).save(record)
    return num_rows


@contextlib.contextmanager
def feast_in_log() -> Iterator[None]:
    """Log what Feast prints to stdout, which belongs to our one JSON line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    finally:
        for line in said.getvalue().splitlines():
            logger.info("feast: %s", line)
