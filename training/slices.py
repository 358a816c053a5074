"""Parts of a labelled set on which a model is looked at separately.

Shapes: R = rows.
"""

from datetime import datetime

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from feature_repo.home import Home
from feature_repo.query_engine import query_engine
from training.dataset import ClickData

LENGTH_CURVE = {
    "history_0": (0, 0),
    "history_1_5": (1, 5),
    "history_6_20": (6, 20),
    "history_21_50": (21, 50),
    "history_51_100": (51, 100),
    "history_101_plus": (101, None),
}
"""Slice -> fewest and most behaviours of all time in the longest scene; None = no end."""
HISTORY_SLICES = LENGTH_CURVE | {"history_1_20": (1, 20)}
"""Those of the curve, and the short histories together."""


def slice_masks(
    home: Home, data: ClickData, *, train_end: datetime
) -> dict[str, NDArray[np.bool_]]:
    """Which rows belong to each slice.

    - ``novel``: the user has a history and never had an event with this item before the request.
    - ``cold_items``: the item's first event lies after the training period, or it has none.
    - ``cold_users``: no history.
    - those of :data:`HISTORY_SLICES`: behaviours in the longest scene at the time of the request.

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
    for name, (low, high) in HISTORY_SLICES.items():
        masks[name] = (longest >= low) & (longest <= (np.inf if high is None else high))
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
    with query_engine() as connection:
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
