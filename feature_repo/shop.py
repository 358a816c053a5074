"""The generated shop: a data set of any size with meaning in its texts and a known best AUC.

Deterministic by its config, byte for byte. What is planted is written down in
:mod:`feature_repo.shop_model`; sessions and baskets in :mod:`feature_repo.shop_history`, slates
and clicks in :mod:`feature_repo.shop_slates`, the words in :mod:`feature_repo.shop_texts`. The
history is the year 2023; items and users keep appearing, so that a model split by time meets items
in its test period that were never seen in training.

``datasets/shop.toml`` describes the files; ``truth.parquet`` is no part of the data set, it only
tells what AUC can be reached at best.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from feature_repo.errors import DataSetError, LongtrailError
from feature_repo.home import complete_folder
from feature_repo.shop_history import (
    Purchases,
    Searches,
    draw_searches,
    draw_sessions,
    fill_baskets,
)
from feature_repo.shop_model import DAY_US, Catalogue, Ints, Shoppers
from feature_repo.shop_slates import Slates, purchases_after_clicks, show_slates
from feature_repo.shop_texts import KINDS, Attributes, titles

START = datetime(2023, 1, 1, tzinfo=UTC)
NUM_DAYS = 365
_PURCHASES_PER_IMPRESSION = 1 / 50  # that follow a click
_ROW_GROUP = 100_000


@dataclass(frozen=True)
class ShopConfig:
    """Size and seed of a shop.

    Raises:
        LongtrailError: If a number is out of its range.
    """

    num_users: int = 2000
    """Users with at least one event each."""
    num_events: int = 60_000
    """Searches and bought items, exactly; at least 10 per user."""
    seed: int = 0
    num_items: int | None = None
    """Items listed until the end; None: one per 10 events, at least 400."""
    num_impressions: int | None = None
    """Items shown, rounded down to whole slates; None: as many as events."""
    slate_size: int = 6
    """K, different items per request, in [2, 20]."""

    def __post_init__(self) -> None:
        if self.num_users < 1:
            raise LongtrailError(f"the number of users must be at least 1, got {self.num_users}")
        if self.num_events < 10 * self.num_users:
            raise LongtrailError(
                f"the number of events must be at least 10 per user, so {10 * self.num_users} "
                f"for {self.num_users} users, got {self.num_events}: ask for more or fewer users"
            )
        if self.seed < 0:
            raise LongtrailError(f"the seed must not be negative, got {self.seed}")
        if not 2 <= self.slate_size <= 20:
            raise LongtrailError(f"the slate size must be in [2, 20], got {self.slate_size}")
        if self.num_items is not None and self.num_items < 20 * self.slate_size:
            raise LongtrailError(
                f"the number of items must be at least 20 times the slate size "
                f"({20 * self.slate_size}), got {self.num_items}"
            )
        shown = self.num_impressions
        if shown is not None and not self.slate_size <= shown <= 5 * self.num_events:
            raise LongtrailError(
                f"the number of impressions must be in [{self.slate_size}, {5 * self.num_events}] "
                f"(from one slate to five times the events), got {shown}"
            )

    def resolved_num_items(self) -> int:
        """Tell the number of items, also where the config leaves it open."""
        return self.num_items or max(400, self.num_events // 10)

    def num_requests(self) -> int:
        """Tell the number of whole slates."""
        return (self.num_impressions or self.num_events) // self.slate_size


@dataclass(frozen=True)
class ShopSummary:
    """What was generated."""

    num_users: int
    num_events: int
    num_items: int
    num_requests: int
    num_impressions: int
    click_rate: float
    """Clicks per impression."""
    best_auc: float | None
    """AUC of the planted probabilities over all impressions, the most that can be expected; None
    where all labels are equal."""


def generate_shop(folder: Path, config: ShopConfig) -> ShopSummary:
    """Write ``events``, ``items``, ``impressions`` and ``truth`` as parquet, all of them or none.

    Cost: linear in events and impressions, about 15 seconds and 0.6 GB for a million of each.

    Args:
        folder: New, empty or with an earlier generated shop, which is replaced as a whole.
        config: Size and seed.

    Raises:
        LongtrailError: If the folder holds anything else.
    """
    _check_replaceable(folder)
    rng = np.random.default_rng(config.seed)
    num_impressions = config.num_requests() * config.slate_size
    num_after_clicks = int(num_impressions * _PURCHASES_PER_IMPRESSION)
    catalogue = Catalogue.draw(rng, config.resolved_num_items(), NUM_DAYS)
    shoppers = Shoppers.draw(rng, config.num_users, NUM_DAYS)
    sessions = draw_sessions(rng, shoppers, config.num_events - num_after_clicks, NUM_DAYS)
    searches = draw_searches(rng, shoppers, sessions)
    baskets = fill_baskets(rng, catalogue, shoppers, sessions)
    slates = show_slates(
        rng,
        catalogue,
        shoppers,
        sessions,
        baskets,
        num_requests=config.num_requests(),
        slate_size=config.slate_size,
        num_days=NUM_DAYS,
    )
    singles = purchases_after_clicks(rng, slates, num_after_clicks, NUM_DAYS * DAY_US)
    items = _items_table(rng, catalogue)
    impressions, truth = _impressions_tables(slates, items["item_id"])
    with complete_folder(folder) as part:
        _write(_events_table(searches, [baskets, singles], items), part / "events.parquet")
        _write(items, part / "items.parquet")
        _write(impressions, part / "impressions.parquet")
        _write(truth, part / "truth.parquet")
    return ShopSummary(
        num_users=config.num_users,
        num_events=config.num_events,
        num_items=config.resolved_num_items(),
        num_requests=config.num_requests(),
        num_impressions=num_impressions,
        click_rate=float(slates.clicked.mean()),
        best_auc=_planted_auc(slates.clicked.ravel(), slates.probability.ravel()),
    )


def best_auc(folder: Path, impressions: pd.DataFrame) -> float:
    """AUC of the planted click probability on some of the impressions of a generated shop.

    Args:
        folder: What :func:`generate_shop` wrote.
        impressions: Rows with request_id, item_id and clicked, in any order.

    Raises:
        DataSetError: If a column is missing, a row is not of this shop, or all labels are equal.
    """
    missing = {"request_id", "item_id", "clicked"} - set(impressions.columns)
    if missing:
        raise DataSetError(f"the impressions lack the column(s) {', '.join(sorted(missing))}")
    truth = pd.read_parquet(folder / "truth.parquet")
    labels = impressions[["request_id", "item_id", "clicked"]]
    rows = labels.merge(truth, on=["request_id", "item_id"], how="left", validate="m:1")
    num_strange = int(rows["probability"].isna().sum())
    if num_strange:
        raise DataSetError(
            f"{num_strange} of {len(rows)} impressions are not of the shop in {folder}: "
            "generate it again with the config they were made with"
        )
    auc = _planted_auc(rows["clicked"].to_numpy(), rows["probability"].to_numpy())
    if auc is None:
        raise DataSetError("an AUC needs impressions with and without a click, got only one sort")
    return auc


def _planted_auc(clicked: NDArray[Any], probability: NDArray[Any]) -> float | None:
    """AUC of the probabilities; None where all labels are equal."""
    if len(np.unique(clicked)) != 2:
        return None
    # scikit-learn takes most of a second to import, and every command's help imports this module.
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(clicked, probability))


def _check_replaceable(folder: Path) -> None:
    """Refuse to replace a folder that holds anything but a generated shop."""
    if folder.exists() and not (folder / "truth.parquet").is_file() and any(folder.iterdir()):
        raise LongtrailError(
            f"{folder} holds other files and would be replaced: name a new or an empty folder"
        )


def _items_table(rng: np.random.Generator, catalogue: Catalogue) -> pa.Table:
    """List the items in the order of their listing; their ids tell nothing."""
    num_items = len(catalogue.kind)
    about = Attributes(
        kind=catalogue.kind,
        theme=catalogue.theme,
        second_theme=catalogue.second_theme,
        family=catalogue.family,
    )
    categories = pa.array([kind.category for kind in KINDS])
    return pa.table(
        {
            "item_id": _ids("i", rng.permutation(num_items)),
            "title": titles(rng, about, catalogue.brand),
            "listed_at": _timestamps(catalogue.listed_us),
            "price": pa.array(catalogue.price),
            "category": categories.take(pa.array(catalogue.kind)),
        }
    )


def _events_table(searches: Searches, purchases: list[Purchases], items: pa.Table) -> pa.Table:
    """List searches and purchases in the order of time; a purchase's text is the item's title."""
    item = pa.array(np.concatenate([p.item for p in purchases]))
    num_searches, num_purchases = len(searches.user), len(item)
    user = np.concatenate([searches.user, *(p.user for p in purchases)])
    time_us = np.concatenate([searches.time_us, *(p.time_us for p in purchases)])
    no_item = pa.nulls(num_searches, pa.string())
    scenes = pa.array(["search", "purchase"])
    table = pa.table(
        {
            "user_id": _ids("u", user),
            "event_timestamp": _timestamps(time_us),
            "scene": scenes.take(pa.array(np.repeat([0, 1], [num_searches, num_purchases]))),
            "text": pa.concat_arrays([searches.text, items["title"].combine_chunks().take(item)]),
            "item_id": pa.concat_arrays([no_item, items["item_id"].combine_chunks().take(item)]),
        }
    )
    return table.take(pa.array(np.lexsort((user, time_us))))


def _impressions_tables(slates: Slates, item_ids: pa.ChunkedArray) -> tuple[pa.Table, pa.Table]:
    """List the impressions and, row by row, the truth about them."""
    num_requests, slate_size = slates.items.shape
    row = np.repeat(np.arange(num_requests), slate_size)
    request_id = _ids("r", row)
    item_id = item_ids.combine_chunks().take(pa.array(slates.items.ravel()))
    impressions = pa.table(
        {
            "request_id": request_id,
            "user_id": _ids("u", slates.user[row]),
            "item_id": item_id,
            "event_timestamp": _timestamps(slates.time_us[row]),
            "clicked": pa.array(slates.clicked.ravel().astype(np.int8)),
            "slot": pa.array(np.tile(np.arange(slate_size, dtype=np.int8), num_requests)),
        }
    )
    truth = pa.table(
        {
            "request_id": request_id,
            "item_id": item_id,
            "probability": pa.array(slates.probability.ravel()),
        }
    )
    return impressions, truth


def _ids(prefix: str, number: Ints) -> pa.Array:
    """Ids such as ``u0000012``."""
    digits = pc.utf8_lpad(pc.cast(pa.array(number), pa.string()), 7, padding="0")
    return pc.binary_join_element_wise(prefix, digits, "")


def _timestamps(time_us: Ints) -> pa.Array:
    """Microseconds since the start as UTC timestamps."""
    start_us = int(START.timestamp()) * 1_000_000
    return pa.array(time_us + start_us, pa.int64()).cast(pa.timestamp("us", tz="UTC"))


def _write(table: pa.Table, path: Path) -> None:
    """Write parquet; the same table gives the same bytes."""
    pq.write_table(table, path, compression="zstd", row_group_size=_ROW_GROUP)
