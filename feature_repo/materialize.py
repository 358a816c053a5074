"""Thin over Feast: register the definitions, copy the latest features to the online store.

Feast's incremental run starts where the last one ended, by event time. A row that arrives late, or
the vector of a text seen long ago, lies before that and would never be copied. So the files that
were copied are remembered, and a run starts at the oldest row of the files that are new.
"""

import contextlib
import io
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
from feast import FeatureStore, FeatureView
from feast.repo_operations import apply_total_with_repo_instance
from feast.utils import _convert_arrow_to_proto
from pydantic import AwareDatetime

from feature_repo.definitions import define
from feature_repo.errors import MissingStepError, StoreError
from feature_repo.home import Home
from feature_repo.manifest import Document, load_manifest
from feature_repo.point_in_time import newest_rows
from feature_repo.profiles import open_store
from feature_repo.progress import Progress, ProgressBars, no_bars

logger = logging.getLogger(__name__)

_BATCH_ROWS = 2000
"""Rows per write: Feast's conversion to protobuf takes about 20 KB per row of 2 x 100 ids."""


class MaterializedFiles(Document):
    """What the online store of a profile was filled from."""

    views: dict[str, dict[str, list[int]]]
    """View -> file name -> [size in bytes, change time in ns]."""
    end: AwareDatetime


@dataclass(frozen=True)
class ApplySummary:
    """What the registry holds after an apply."""

    entities: tuple[str, ...]
    views: tuple[str, ...]
    services: tuple[str, ...]
    removed: tuple[str, ...]


@dataclass(frozen=True)
class MaterializedView:
    """What was copied of one view: rows from ``start`` on, None where nothing was new."""

    name: str
    start: datetime | None
    seconds: float


def apply(home: Home, profile: str) -> ApplySummary:
    """Register the home's definitions as `feast apply` does; what is defined no more is removed."""
    definitions = define(home)
    store = open_store(home, profile)
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
    home: Home, profile: str, *, full: bool = False, bars: ProgressBars = no_bars
) -> list[MaterializedView]:
    """Copy each key's latest features, as of now, to the online store.

    Args:
        home: Where the features are.
        profile: Which online store.
        full: Copy everything again, into empty tables.
        bars: Opens a progress bar for a view; receives its rows.

    Raises:
        MissingStepError: If nothing was built or applied.
    """
    end = load_manifest(home).now()
    store = open_store(home, profile)
    record = home.root / f"materialized-{profile}.json"
    with home.lock(f"online-{profile}"), feast_in_log():
        copied: dict[str, dict[str, list[int]]] = {}
        if record.exists() and not full:
            copied = dict(MaterializedFiles.load(record, made_by="longtrail materialize").views)
        views = [view for view in store.list_feature_views() if _files(view)]
        if not views:
            raise MissingStepError(
                f"no applied feature view of {home.root} has features: run `longtrail encode`, "
                "`longtrail sequences` and `longtrail apply` first"
            )
        done = []
        for view in views:
            began = time.perf_counter()
            with bars(view.name) as progress:
                start = _copy(store, view, copied.get(view.name), end, progress)
            copied[view.name] = _files(view)
            MaterializedFiles(views=copied, end=end).save(record)
            done.append(MaterializedView(view.name, start, time.perf_counter() - began))
    return done


def _copy(
    store: FeatureStore,
    view: FeatureView,
    copied: dict[str, list[int]] | None,
    end: datetime,
    progress: Progress,
) -> datetime | None:
    """Copy what is new of a view; the oldest event time copied, None where nothing was new."""
    files = _files(view)
    folder = Path(view.batch_source.path).parent
    if copied is not None and all(files.get(name) == status for name, status in copied.items()):
        added = files.keys() - copied.keys()
        if not added:
            return None
        start = min(_first_event(folder / name) for name in added)
    else:
        start = min(_first_event(folder / name) for name in files)
        # Keys that are gone must not stay online.
        store._get_provider().update_infra(store.project, [view], [], [], [], partial=True)
        store._get_provider().update_infra(store.project, [], [view], [], [], partial=True)
    if start > end:
        raise StoreError(
            f"{view.name} has only features from {start} on, after now ({end}); is the clock right?"
        )
    _write_newest(store, view, start, end, progress)
    store.registry.apply_materialization(view, store.project, start, end)
    return start


def _write_newest(
    store: FeatureStore, view: FeatureView, start: datetime, end: datetime, progress: Progress
) -> None:
    """Write each key's newest row, in batches: Feast's own run holds all of them in memory."""
    join_keys = {c.name: c.dtype.to_value_type() for c in view.entity_columns}
    (key,) = join_keys
    num_rows, batches = newest_rows(
        str(view.batch_source.path), key=key, start=start, end=end, batch_rows=_BATCH_ROWS
    )
    provider = store._get_provider()
    for batch in batches:
        rows = _convert_arrow_to_proto(batch, view, join_keys)
        provider.online_write_batch(store.config, view, rows, None)
        progress(len(rows), num_rows)


def _files(view: FeatureView) -> dict[str, list[int]]:
    """The view's non-empty files with their identity."""
    pattern = Path(view.batch_source.path)
    return {
        file.name: [file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(pattern.parent.glob(pattern.name))
        if pq.read_metadata(file).num_rows
    }


def _first_event(file: Path) -> datetime:
    """Oldest event time in a file, from its statistics."""
    metadata = pq.read_metadata(file)
    # Leaf columns: a list column has one leaf too, under another path.
    paths = [metadata.row_group(0).column(i).path_in_schema for i in range(metadata.num_columns)]
    column = paths.index("event_timestamp")
    oldest: datetime = min(
        metadata.row_group(group).column(column).statistics.min
        for group in range(metadata.num_row_groups)
    )
    return oldest if oldest.tzinfo else oldest.replace(tzinfo=UTC)


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
