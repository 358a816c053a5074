"""Parts of a labelled set on which a model is looked at separately.

Shapes: R = rows.
"""

from datetime import datetime

import duckdb
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from feature_repo.home import Home
from training.dataset import ClickData

HISTORY_BUCKETS = ((0, 0), (1, 5), (6, 20), (21, 50), (51, 100))
"""Behaviours in the longest scene; the last bucket holds longer ones too, cut to the newest 100."""


def slice_masks(
    home: Home, data: ClickData, *, train_end: datetime
) -> dict[str, NDArray[np.bool_]]:
    """Which rows belong to each slice.

    - ``novel``: the user has a history and never had an event with this item before the request.
    - ``cold_items``: the item's first event lies after the training period, or it has none.
    - ``cold_users``: no history.
    - ``history_<low>_<high>``: behaviours in the longest scene at the time of the request.

    Args:
        home: Whose events say what was before.
        data: R rows.
        train_end: Time of the last training impression, UTC.

    Returns:
        Slice -> bool [R], True = in it.
    """
    context_of_row = np.repeat(np.arange(data.num_contexts), np.diff(data.offsets))
    longest = data.users.history_totals.max(axis=1)[context_of_row]
    seen, cold = _event_facts(home, data, train_end)
    masks = {
        "novel": (longest > 0) & ~seen,
        "cold_items": cold,
        "cold_users": longest == 0,
    }
    for low, high in HISTORY_BUCKETS:
        last = high == HISTORY_BUCKETS[-1][1]
        masks[f"history_{low}_{high}" if high else "history_0"] = (longest >= low) & (
            (longest <= high) | last
        )
    return masks


def _event_facts(
    home: Home, data: ClickData, train_end: datetime
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether the user had an event with the item before, and whether the item is new."""
    rows = pd.DataFrame(
        {
            "row": np.arange(len(data)),
            "user_id": data.impressions.user_ids.astype(str),
            "item_id": data.impressions.item_ids.astype(str),
            "request_time": data.impressions.times,
        }
    )
    with duckdb.connect() as connection:
        connection.register("requests", rows)
        connection.from_parquet(str(home.events / "*.parquet")).create_view("events")
        facts = connection.execute(
            """
            WITH pairs AS (
                SELECT user_id, item_id, min(epoch_us(event_timestamp)) AS first_us
                FROM events
                SEMI JOIN (SELECT DISTINCT user_id, item_id FROM requests) USING (user_id, item_id)
                GROUP BY ALL
            ), firsts AS (
                SELECT item_id, min(epoch_us(event_timestamp)) AS item_first_us
                FROM events WHERE item_id IS NOT NULL GROUP BY ALL
            )
            SELECT coalesce(pairs.first_us < requests.request_time, false) AS seen,
                   coalesce(firsts.item_first_us > ?, true) AS cold
            FROM requests
            LEFT JOIN pairs USING (user_id, item_id)
            LEFT JOIN firsts USING (item_id)
            ORDER BY requests.row
            """,
            [round(train_end.timestamp() * 1e6)],
        ).fetchnumpy()
    return np.asarray(facts["seen"], dtype=bool), np.asarray(facts["cold"], dtype=bool)
