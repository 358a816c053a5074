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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from feast.repo_operations import apply_total_with_repo_instance

from feature_repo.definitions import define
from feature_repo.errors import MissingStepError, StoreError
from feature_repo.home import Home
from feature_repo.live_offline import LiveOffline
from feature_repo.manifest import Document, load_manifest
from feature_repo.offline import open_offline
from feature_repo.online import open_writer
from feature_repo.online_copy import CopyState, MaterializedView, ViewCopy
from feature_repo.profiles import open_store
from feature_repo.progress import ProgressBars, no_bars
from feature_repo.push import LivePush

logger = logging.getLogger(__name__)


class Materialized(Document):
    """What was copied to the online store of a profile."""

    views: dict[str, CopyState]


def copied_views(home: Home, profile: str) -> dict[str, CopyState]:
    """View -> how far it was copied to the online store of a profile; none before the first copy.

    Raises:
        StoreError: If another version wrote the record.
    """
    record = home.materialized(profile)
    if not record.exists():
        return {}
    return dict(Materialized.load(record, made_by="longtrail materialize").views)


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

    A run that was killed goes on behind its last finished window. Keys that are gone offline, and
    rows older than their view's time to live, leave the online store. Users with live events that
    come meanwhile are pushed once more at the end: the copy knows them as they were before.

    Args:
        home: Where the record of what was copied is.
        profile: Which stores.
        full: Copy everything again, into empty tables.
        num_workers: Threads that encode and write.
        bars: Opens a progress bar for a view; receives its rows.

    Raises:
        MissingStepError: If nothing was built or applied.
        StoreError: If a store fails, or another process copies to the same online store.
    """
    load_manifest(home)  # before any store is made
    store = open_store(home, profile)
    live = LiveOffline(home, profile, store)
    journal = live.journal()
    copied_events = journal.last_sequence() if journal else 0
    live.catch_up()
    end = load_manifest(home).now()
    offline = open_offline(store)
    record = home.materialized(profile)
    with home.lock(f"online-{profile}"), feast_in_log():
        try:
            states = copied_views(home, profile)
        except StoreError as error:  # of another version: what is online is unknown
            logger.info("%s", error)
            states, full = {}, True
        held = {view.name: bool(offline.parts(view.name)) for view in store.list_feature_views()}
        if not any(held.values()):
            raise MissingStepError(
                f"no applied feature view of {home.root} has features: run `longtrail encode`, "
                "`longtrail sequences` and `longtrail apply` first"
            )
        writer = open_writer(store)
        done = []
        with writer.hold(f"{socket.gethostname()}:{record}"):
            for view in store.list_feature_views():
                if not held[view.name] and view.name not in states:
                    continue

                def save(state: CopyState, name: str = view.name) -> None:
                    states[name] = state
                    Materialized(views=states).save(record)

                with bars(view.name) as progress:
                    copy = ViewCopy(store, offline, writer, view, end, num_workers, save, progress)
                    done.append(copy.run(states.get(view.name), full=full))
        if journal := live.journal():
            LivePush(home, store, writer, journal).push(journal.users_since(copied_events))
    return done


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
            if states := copied_views(home, profile):
                kept = {name: state for name, state in states.items() if name not in wanted}
                Materialized(views=kept).save(record)
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
