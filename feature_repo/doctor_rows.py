"""Checks of the rows that the stores hold; see :mod:`feature_repo.doctor`."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import numpy as np
from feast import FeatureView
from feast.types import Array, Float32, Int64
from numpy.typing import NDArray

from feature_repo.live_store import LiveStore
from feature_repo.offline import time_literal
from feature_repo.offline_files import batch_parts, file_parts
from feature_repo.postgres_tables import view_tables

_LOOKED_UP_KEYS = 5000
"""Keys whose event times are read online: Redis walks through its keys in the order of a hash."""
_REQUEST_KEYS = 1000


def built(live: LiveStore) -> Iterator[str]:
    """Views without rows can be neither copied nor read."""
    for view in live.views:
        if not live.parts[view.name]:
            yield f"{view.name} has no rows offline"


def loaded(live: LiveStore) -> Iterator[str]:
    """Tables that do not hold the state of the files that the steps wrote."""
    if live.store.config.offline_store.type != "postgres":
        return
    for table in view_tables(live.home):
        parts = live.parts.get(table.name)
        if parts is not None and parts != batch_parts(file_parts(table.files)):
            yield f"{table.name} holds another state than {table.files}"


def equal_rows(live: LiveStore) -> Iterator[str]:
    """Rows of which Feast's joins return both, or an arbitrary one."""
    question = (
        "SELECT count(*) FROM (SELECT 1 AS one FROM {rows} "
        "GROUP BY {key}, event_timestamp, created_timestamp HAVING count(*) > 1) AS repeated"
    )
    for view in live.held:
        (number,) = live.offline.ask(view.name, question)
        if number:
            yield f"{view.name} repeats {number:,} (key, event time, created time)"


def times(live: LiveStore) -> Iterator[str]:
    """Times without zone, rows of events that are still to come, rows created later than today."""
    manifest = live.manifest
    # A row may wait for its click, or for the batch that would write it.
    waits = timedelta(microseconds=max(manifest.availability_delay_us, manifest.label_delay_us))
    today = datetime.now(UTC)
    question = (
        "SELECT max(event_timestamp), max(created_timestamp), "  # noqa: S608
        f"count(*) FILTER (WHERE event_timestamp > {time_literal(live.now + waits)}), "
        f"count(*) FILTER (WHERE created_timestamp > {time_literal(today)}) FROM {{rows}}"
    )
    for view in live.held:
        event, created, num_future, num_created = live.offline.ask(view.name, question)
        for name, newest in (("event_timestamp", event), ("created_timestamp", created)):
            if newest.tzinfo is None:
                yield f"{name} of {view.name} has no time zone"
        if num_future:
            yield f"{view.name} has {num_future:,} rows of after now ({live.now}), up to {event}"
        if num_created:
            yield f"{view.name} has {num_created:,} rows created in the future, up to {created}"


def nulls(live: LiveStore) -> Iterator[str]:
    """Nulls that come back as another value: elements of lists, int64 scalars."""
    for view in live.held:
        counts = {}
        for field in view.features:
            if field.dtype in (Array(Int64), Array(Float32)):
                found = f'count(*) FILTER (WHERE array_position("{field.name}", NULL) IS NOT NULL)'
                counts[f"lists with a null in {field.name}"] = found
            elif field.dtype == Int64:
                counts[f"null in {field.name}"] = f'count(*) - count("{field.name}")'
        if not counts:
            continue
        answer = live.offline.ask(view.name, f"SELECT {', '.join(counts.values())} FROM {{rows}}")  # noqa: S608
        for what, number in zip(counts, answer, strict=True):
            if number:
                yield f"{view.name} has {number:,} {what}"


def copied(live: LiveStore) -> Iterator[str]:
    """Views that are not online as they are offline, as far as the record of copies tells."""
    for view in live.held:
        state = live.copies.get(view.name)
        if state is None:
            yield f"{view.name} was never copied"
        elif state.unfinished is not None:
            yield f"a copy of {view.name} was begun and did not end"
        elif state.parts != live.parts[view.name]:
            yield f"{view.name} has changed since it was copied"
        elif live.writer.marks(view.name) != {state.mark}:
            yield f"the online store has lost rows of {view.name}, or is another one"


def counts(live: LiveStore) -> Iterator[str]:
    """Keys that are gone offline and yet online, or the other way round."""
    for view in live.held:
        oldest = f"AND event_timestamp >= {time_literal(live.now - view.ttl)}" if view.ttl else ""
        question = (
            "SELECT count(DISTINCT {key}) FROM {rows} "  # noqa: S608
            f"WHERE event_timestamp <= {time_literal(live.now)} {oldest}"
        )
        (offline,) = live.offline.ask(view.name, question)
        online = live.writer.count(view)
        if online != offline:
            yield f"{view.name} has {online:,} keys online and {offline:,} offline"


def expired_online(live: LiveStore) -> Iterator[str]:
    """Rows that Feast's own online reads return although their time is over."""
    for view in live.views:
        if not view.ttl or (oldest := (live.now - view.ttl).timestamp()) <= 0:
            continue  # for ever, or for longer than there are logs
        num_expired = num_keys = 0
        for written in _event_times(live, view):
            num_keys += len(written)
            num_expired += int((written < oldest).sum())
        if num_expired:
            yield (
                f"{num_expired:,} of {num_keys:,} rows of {view.name} online are older than "
                f"{view.ttl}"
            )


def _event_times(live: LiveStore, view: FeatureView) -> Iterator[NDArray[np.float64]]:
    """Event times of some rows online, epoch seconds, a request at a time."""
    (key,) = view.entity_columns
    num_keys = 0
    for keys in live.writer.keys(view, _REQUEST_KEYS):
        if not len(keys):
            continue
        response = live.store.get_online_features(
            features=[f"{view.name}:{view.features[0].name}"],
            entity_rows=[{key.name: value} for value in keys.to_pylist()],
            full_feature_names=True,
        ).proto
        # What is asked for comes beside the keys, in any order.
        names = list(response.metadata.feature_names.val)
        found = response.results[names.index(f"{view.name}__{view.features[0].name}")]
        yield np.array([moment.seconds for moment in found.event_timestamps], dtype=np.float64)
        num_keys += len(keys)
        if num_keys >= _LOOKED_UP_KEYS:
            return
