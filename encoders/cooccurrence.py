"""Which behaviour texts belong together: counted over users' baskets of one period.

A basket is what one user did at one moment, over all scenes; the next basket is what the same user
did at the next distinct moment.

Shapes: V = distinct texts of the period, B = texts of a batch, P = pairs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feature_repo.errors import DataSetError
from feature_repo.home import Home
from feature_repo.query_engine import query_engine

SAME_BASKET = 0
NEXT_BASKET = 1
MAX_BASKET_TEXTS = 200
"""A larger basket is represented by so many of its texts, drawn by hash: pairs grow as its square.
Nine baskets of 34,000 in Online Retail II are larger."""
MAX_PAIRS = 50_000_000
"""Pairs counted at most, which bounds the result at 600 MB: beyond that, a share of the users,
drawn by hash, stands for all. Online Retail II has 35 million in 20 months."""
MEMORY_LIMIT = "4GB"
"""Of the query engine; what is larger goes to a temporary folder."""

_BASKETS = """
CREATE TEMP TABLE baskets AS
WITH lines AS (
    SELECT user_id, event_timestamp, behavior_id
    FROM read_parquet($events)
    WHERE event_timestamp >= $start AND event_timestamp < $stop
    GROUP BY user_id, event_timestamp, behavior_id
    QUALIFY row_number() OVER (
        PARTITION BY user_id, event_timestamp
        ORDER BY hash(user_id, event_timestamp, behavior_id), behavior_id
    ) <= $largest
)
SELECT
    dense_rank() OVER (ORDER BY user_id) AS user_number,
    dense_rank() OVER (ORDER BY user_id, event_timestamp) AS basket,
    behavior_id
FROM lines
"""
_NUM_PAIRS = """
WITH sizes AS (SELECT user_number, basket, count(*) AS num FROM baskets GROUP BY ALL)
SELECT coalesce(sum(a.num * b.num), 0)::DOUBLE
FROM sizes a CROSS JOIN (SELECT unnest($gaps) AS gap) gaps
JOIN sizes b ON b.user_number = a.user_number AND b.basket = a.basket + gaps.gap
"""
_THIN = "DELETE FROM baskets WHERE hash(user_number) % 1000000 >= 1000000 * $share"
_TEXTS = """
CREATE TEMP TABLE texts AS
SELECT behavior_id, row_number() OVER (ORDER BY behavior_id) - 1 AS place, count(*) AS num_baskets
FROM baskets GROUP BY behavior_id
"""
_NAMED_TEXTS = """
SELECT texts.behavior_id, num_baskets, text
FROM texts JOIN read_parquet($behaviors) USING (behavior_id) ORDER BY place
"""
_PAIRS = """
WITH placed AS (SELECT user_number, basket, place FROM baskets JOIN texts USING (behavior_id))
SELECT a.place::INTEGER AS first, b.place::INTEGER AS second, count(*)::FLOAT AS num
FROM placed a CROSS JOIN (SELECT unnest($gaps) AS gap) gaps
JOIN placed b
    ON b.user_number = a.user_number AND b.basket = a.basket + gaps.gap AND b.place != a.place
GROUP BY ALL ORDER BY first, second
"""
_SAMPLED_PAIRS = """
WITH sampled AS (
    SELECT
        a.user_number, a.basket, min_by(a.behavior_id, hash(a.basket, a.behavior_id)) AS behavior_id
    FROM baskets a
    SEMI JOIN baskets b ON b.user_number = a.user_number AND b.basket = a.basket + 1
    GROUP BY a.user_number, a.basket
    ORDER BY hash(a.basket), a.basket
    LIMIT $num
),
pairs AS (
    SELECT
        a.basket, a.behavior_id AS first,
        min_by(b.behavior_id, hash(a.basket, b.behavior_id)) AS second
    FROM sampled a
    JOIN baskets b
        ON b.user_number = a.user_number AND b.basket = a.basket + 1
        AND b.behavior_id != a.behavior_id
    GROUP BY a.basket, a.behavior_id
)
SELECT p.text, q.text
FROM pairs
JOIN read_parquet($behaviors) p ON p.behavior_id = first
JOIN read_parquet($behaviors) q ON q.behavior_id = second
ORDER BY pairs.basket
"""


@dataclass(frozen=True)
class CoOccurrence:
    """How often each text is followed or accompanied by each other text; rows sorted by text id.

    Args:
        behavior_ids: int64 [V], ascending.
        texts: V texts.
        num_baskets: int64 [V]; baskets that hold the text, at least 1.
        starts: int64 [V + 1]; the pairs of text i are those from ``starts[i]`` to ``starts[i+1]``.
        partners: int32 [P]; place of each pair's other text, never the text itself.
        counts: float32 [P]; how often the pair was seen, at least 1.
        user_share: Share of the users that was counted; 1 unless there were too many pairs.
    """

    behavior_ids: NDArray[np.int64]
    texts: list[str]
    num_baskets: NDArray[np.int64]
    starts: NDArray[np.int64]
    partners: NDArray[np.int32]
    counts: NDArray[np.float32]
    user_share: float

    def block(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Counts among some texts.

        Args:
            rows: int64 [B], distinct.

        Returns:
            float32 [B, B]; the diagonal is 0.
        """
        column_of = np.full(len(self.texts), -1)
        column_of[rows] = np.arange(len(rows))
        row, pair = self._pairs_of(rows)
        column = column_of[self.partners[pair]]
        inside = column >= 0
        block = np.zeros((len(rows), len(rows)), dtype=np.float32)
        block[row[inside], column[inside]] = self.counts[pair[inside]]
        return block

    def draw_partners(
        self, rows: NDArray[np.int64], random: np.random.Generator
    ) -> NDArray[np.int64]:
        """Draw one partner of each text, with probability ``~ count / sqrt(num_baskets)``.

        Counts grow with a partner's frequency, so partners come by about frequency^0.5, as the
        texts themselves do. A text without partners gives none.

        Returns:
            int64 [at most B].
        """
        row, pair = self._pairs_of(rows)
        lengths = np.bincount(row, minlength=len(rows))
        stops = np.cumsum(lengths)
        weights = self.counts[pair] / np.sqrt(self.num_baskets[self.partners[pair]])
        sums = np.concatenate([[0.0], np.cumsum(weights, dtype=np.float64)])
        low, high = sums[stops - lengths], sums[stops]
        wanted = low + random.random(len(rows)) * (high - low)
        place = np.searchsorted(sums, wanted, side="right") - 1
        place = np.minimum(place, stops - 1)[lengths > 0]  # rounding may reach the next text's
        partners: NDArray[np.int64] = self.partners[pair[place]].astype(np.int64)
        return partners

    def _pairs_of(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Index in ``rows`` and place in ``partners`` of every pair of these texts."""
        first = self.starts[rows]
        lengths = self.starts[rows + 1] - first
        row = np.repeat(np.arange(len(rows)), lengths)
        within = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return row, first[row] + within


def count_pairs(
    home: Home,
    *,
    start: datetime,
    stop: datetime,
    gaps: Sequence[int],
    max_pairs: int = MAX_PAIRS,
    largest_basket: int = MAX_BASKET_TEXTS,
) -> CoOccurrence:
    """Count the pairs of texts in the baskets of ``[start, stop)``, all scenes of a user together.

    The same rows give the same counts whatever the number of threads; the draws by hash hold for
    one version of DuckDB.

    Args:
        home: The home folder; ingest has been run.
        start: First moment, UTC.
        stop: First moment that no longer counts, UTC.
        gaps: Of :data:`SAME_BASKET` and :data:`NEXT_BASKET`, which count; a pair is directed, from
            a text to one in the same or in the next basket.
        max_pairs: See :data:`MAX_PAIRS`.
        largest_basket: See :data:`MAX_BASKET_TEXTS`.

    Raises:
        DataSetError: If there is no event or no pair in the period.
    """
    with _baskets(home, start, stop, largest_basket) as connection:
        num_pairs = connection.execute(_NUM_PAIRS, {"gaps": list(gaps)}).fetchone()[0]
        share = min(1.0, max_pairs / max(num_pairs, 1.0))
        if share < 1:
            connection.execute(_THIN, {"share": share})
        connection.execute(_TEXTS)
        texts = connection.execute(_NAMED_TEXTS, {"behaviors": str(home.behaviors)}).fetchnumpy()
        pairs = connection.execute(_PAIRS, {"gaps": list(gaps)}).fetchnumpy()
    if not len(texts["text"]):
        raise DataSetError(f"there are no events before {stop.isoformat()}: choose a later --until")
    if not len(pairs["num"]):
        raise DataSetError(
            f"no two texts go together before {stop.isoformat()}: no user did two different things "
            "in one or two baskets; choose a later --until"
        )
    return CoOccurrence(
        behavior_ids=texts["behavior_id"],
        texts=texts["text"].tolist(),
        num_baskets=texts["num_baskets"],
        starts=np.searchsorted(pairs["first"], np.arange(len(texts["text"]) + 1)).astype(np.int64),
        partners=pairs["second"],
        counts=pairs["num"],
        user_share=share,
    )


def sample_next_pairs(
    home: Home, *, start: datetime, stop: datetime, num: int
) -> list[tuple[str, str]]:
    """Draw texts with one text of the user's next basket each, from ``[start, stop)``.

    A user's basket gives at most one pair, so that large baskets do not count more; the two texts
    differ. Drawn by hash: the same rows give the same pairs.

    Args:
        home: The home folder; ingest has been run.
        start: First moment, UTC.
        stop: First moment that no longer counts, UTC.
        num: Most pairs.
    """
    with _baskets(home, start, stop, MAX_BASKET_TEXTS) as connection:
        parameters = {"num": num, "behaviors": str(home.behaviors)}
        pairs: list[tuple[str, str]] = connection.execute(_SAMPLED_PAIRS, parameters).fetchall()
    return pairs


@contextmanager
def _baskets(home: Home, start: datetime, stop: datetime, largest: int) -> Iterator[Any]:
    """A connection with the table ``baskets`` (user_number, basket, behavior_id)."""
    with (
        TemporaryDirectory() as scratch,
        query_engine(
            {
                "memory_limit": MEMORY_LIMIT,
                "temp_directory": scratch,
                "preserve_insertion_order": False,
            }
        ) as connection,
    ):
        connection.execute(
            _BASKETS,
            {
                "events": str(home.events / "*.parquet"),
                "start": start,
                "stop": stop,
                "largest": largest,
            },
        )
        yield connection
