"""Co-purchase as an item view: which items the same users, and the same baskets, hold.

Every :data:`REFRESH_DAYS` days, at midnight UTC, each item that was met before gets a row with the
:data:`NUM_NEIGHBORS` items nearest to it. Two weights say how near: the cosine of the two items'
columns in the matrix of baskets x items and in that of users x items, each entry 0 or 1, shrunk so
that a pair met once by chance weighs little::

    weight(i, j) = n_ij / sqrt(n_i * n_j + SHRINKAGE)

with n_ij the baskets (users) that hold both. A basket is what one user did at one moment; scenes
are not told apart. A row holds what lay strictly before its midnight.

Source:
    Linden et al., "Amazon.com Recommendations: Item-to-Item Collaborative Filtering", IEEE Internet
    Computing 2003; the shrinkage is ours.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy import sparse

from feature_repo.behavior import hash63_array
from feature_repo.feature_files import (
    DAY_S,
    BuildSummary,
    WholeView,
    event_buckets,
    view_settings,
)
from feature_repo.fields import FeatureField, arrow_schema
from feature_repo.home import Home
from feature_repo.manifest import DataManifest
from feature_repo.progress import Progress

VIEW = "item_neighbors"
VERSION = 1
"""Raised whenever the rows change for the same events."""
NUM_NEIGHBORS = 64
"""K: of 4,600 items, 64 keep nearly all of what all keep (docs/log.md)."""
REFRESH_DAYS = 14
SHRINKAGE = 100.0
MAX_ITEMS_PER_GROUP = 1000
"""Newest distinct items of a basket or a user that count: pairs grow with the square."""
NEIGHBOR_FIELDS = ("neighbor_keys", "neighbor_basket_weights", "neighbor_user_weights")
_BLOCK_VALUES = 8_000_000
"""Dense values at a time: 32 MB."""


def fields(_manifest: DataManifest) -> tuple[FeatureField, ...]:
    """Return the fields of the view, in the order of the files."""
    nearest = f"of the up to {NUM_NEIGHBORS} items nearest to this one, nearest first"
    return (
        FeatureField("neighbor_keys", "int64_list", f"63-bit hashes of the ids {nearest}"),
        FeatureField(
            "neighbor_basket_weights",
            "float32_list",
            f"shrunk cosines over baskets {nearest}; in [0, 1]",
        ),
        FeatureField(
            "neighbor_user_weights",
            "float32_list",
            f"shrunk cosines over users {nearest}; in [0, 1]",
        ),
    )


def build_item_neighbors(
    home: Home, manifest: DataManifest, progress: Progress, *, threads: int = 2
) -> BuildSummary:
    """Build the files of the view where events or settings changed.

    Cost: each refresh counts the pairs of all users so far, sparse; memory is 12 bytes per event
    and a block of items x items.

    Args:
        home: Where events are read and features are written.
        manifest: What ingest wrote.
        progress: Receives events done of all events, in shares as the files are written.
        threads: Threads of the query engine.

    Raises:
        MissingStepError: If there are no events.
        LongtrailError: If another process builds the same view.
    """
    settings = view_settings(manifest, version=VERSION, last_event=manifest.last_event.isoformat())
    schema = arrow_schema("item_id", fields(manifest))
    delay = timedelta(microseconds=manifest.availability_delay_us)

    def write(connection: Any, folder: Path, done: Callable[[int, int], None]) -> dict[str, int]:
        events = _read(connection, home)
        moments = _refreshes(events.seconds, manifest.last_event)
        files = {}
        for index, moment in enumerate(moments):
            name = f"part-{index:05d}.parquet"
            stamp = datetime.fromtimestamp(moment, UTC) + delay
            with pq.ParquetWriter(folder / name, schema, compression="zstd") as writer:
                files[name] = 0
                for rows in neighbor_rows(events.before(moment)):
                    table = _table(events.item_ids, rows, stamp, schema)
                    writer.write_table(table)
                    files[name] += table.num_rows
            done(index, len(moments))
        if not moments:  # a view needs a file to be read
            files["part-00000.parquet"] = 0
            pq.write_table(schema.empty_table(), folder / "part-00000.parquet")
        return files

    view = WholeView(home.view(VIEW), schema, settings, write)
    return view.build(home, progress, threads=threads)


@dataclass(frozen=True)
class ItemEvents:
    """E events that name an item, as numbers, in order of time.

    Args:
        users: int32 [E]; number of the user.
        items: int32 [E]; place in ``item_ids``.
        seconds: int64 [E]; epoch seconds, ascending.
        item_ids: The distinct ids.
    """

    users: NDArray[np.int32]
    items: NDArray[np.int32]
    seconds: NDArray[np.int64]
    item_ids: NDArray[np.object_]

    def before(self, moment: int) -> "ItemEvents":
        """The events strictly before ``moment``, epoch seconds."""
        end = int(np.searchsorted(self.seconds, moment))
        return ItemEvents(self.users[:end], self.items[:end], self.seconds[:end], self.item_ids)


@dataclass(frozen=True)
class NeighborRows:
    """Neighbours of some items, end to end.

    Args:
        items: int [R]; places of the items.
        counts: int [R]; neighbours of each.
        neighbors: int [sum of counts]; places of the neighbours, nearest first.
        basket_weights: float32 [sum of counts].
        user_weights: float32 [sum of counts].
    """

    items: NDArray[np.int64]
    counts: NDArray[np.int64]
    neighbors: NDArray[np.int64]
    basket_weights: NDArray[np.float32]
    user_weights: NDArray[np.float32]


def neighbor_rows(events: ItemEvents) -> Iterator[NeighborRows]:
    """The neighbours of every item of the events, a block of items at a time.

    The nearest are those with the largest sum of the two weights.
    """
    num_items = len(events.item_ids)
    baskets = _memberships(_basket_numbers(events), events)
    users = _memberships(events.users, events)
    met = np.flatnonzero(np.bincount(events.items, minlength=num_items))
    size = max(1, _BLOCK_VALUES // max(1, num_items))
    for start in range(0, len(met), size):
        block = met[start : start + size]
        by_basket, by_user = _weights(baskets, block), _weights(users, block)
        nearness = by_basket + by_user
        kept = min(NUM_NEIGHBORS, num_items)
        nearest = np.argpartition(-nearness, kept - 1, axis=1)[:, :kept]
        rows = np.arange(len(block))[:, None]
        # Ties by place, so that the files are the same every time.
        order = np.lexsort((nearest, -nearness[rows, nearest]), axis=1)
        nearest = nearest[rows, order]
        there = nearness[rows, nearest] > 0
        yield NeighborRows(
            items=block,
            counts=there.sum(axis=1),
            neighbors=nearest[there],
            basket_weights=by_basket[rows, nearest][there],
            user_weights=by_user[rows, nearest][there],
        )


def _basket_numbers(events: ItemEvents) -> NDArray[np.int32]:
    pairs = np.stack([events.users.astype(np.int64), events.seconds], axis=1)
    return np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int32)


def _memberships(groups: NDArray[np.int32], events: ItemEvents) -> Any:
    """Sparse matrix of groups x items, 1 where the group holds the item; large groups are cut."""
    num_items = len(events.item_ids)
    # Reversed, the first occurrence of a pair is its newest.
    pairs, from_end = np.unique(
        (groups.astype(np.int64) * num_items + events.items)[::-1], return_index=True
    )
    newest_first = np.lexsort((from_end, pairs // num_items))
    pairs = pairs[newest_first]
    in_group = np.arange(len(pairs)) - np.searchsorted(pairs // num_items, pairs // num_items)
    pairs = pairs[in_group < MAX_ITEMS_PER_GROUP]
    return sparse.csc_matrix(
        (np.ones(len(pairs), dtype=np.float32), (pairs // num_items, pairs % num_items)),
        shape=(int(groups.max()) + 1, num_items),
    )


def _weights(memberships: Any, block: NDArray[np.int64]) -> NDArray[np.float32]:
    """Shrunk cosines of the block's items with all items, float32 [b, items]; 0 with itself."""
    sizes = np.asarray(memberships.sum(axis=0), dtype=np.float32).reshape(-1)
    both: NDArray[np.float32] = (memberships[:, block].T @ memberships).toarray()
    both[np.arange(len(block)), block] = 0
    both /= np.sqrt(sizes[block, None] * sizes[None, :] + np.float32(SHRINKAGE))
    return both


def _read(connection: Any, home: Home) -> ItemEvents:
    paths = [str(path) for path in event_buckets(home).values()]
    events = connection.read_parquet(paths)
    named = events.filter(events.item_id.notnull())
    table = connection.to_pyarrow(
        named.select(
            "user_id",
            "item_id",
            seconds=named.event_timestamp.truncate("s").epoch_seconds().cast("int64"),
        ).order_by("seconds", "user_id", "item_id")
    )
    users = table["user_id"].combine_chunks().dictionary_encode()
    items = table["item_id"].combine_chunks().dictionary_encode()
    return ItemEvents(
        users=users.indices.to_numpy(zero_copy_only=False).astype(np.int32),
        items=items.indices.to_numpy(zero_copy_only=False).astype(np.int32),
        seconds=table["seconds"].to_numpy(),
        item_ids=np.asarray(items.dictionary.to_pylist(), dtype=object),
    )


def _refreshes(seconds: NDArray[np.int64], last_event: datetime) -> list[int]:
    """Midnights at which the neighbours are counted anew, epoch seconds: fixed on the calendar."""
    if not len(seconds):
        return []
    step = REFRESH_DAYS * DAY_S
    first = int(seconds[0]) // step + 1
    return [number * step for number in range(first, int(last_event.timestamp()) // step + 1)]


def _table(
    item_ids: NDArray[np.object_], rows: NeighborRows, stamp: datetime, schema: pa.Schema
) -> pa.Table:
    keys = hash63_array(item_ids)
    offsets = pa.array(np.r_[0, np.cumsum(rows.counts)].astype(np.int32))
    stamps = pa.array([stamp] * len(rows.items), schema.field("event_timestamp").type)
    columns = [
        pa.array(item_ids[rows.items], pa.string()),
        stamps,
        stamps,
        pa.ListArray.from_arrays(offsets, pa.array(keys[rows.neighbors])),
        pa.ListArray.from_arrays(offsets, pa.array(rows.basket_weights)),
        pa.ListArray.from_arrays(offsets, pa.array(rows.user_weights)),
    ]
    return pa.Table.from_arrays(columns, schema=schema)
