"""Which behaviour a language model may be tuned on, and what comes after it as a measure.

Vectors tuned on the baskets of labelled requests carry the labels into the rows that a click model
is trained on. So only events strictly before the first training impression are used, where there
are enough of them.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import numpy as np
from numpy.typing import NDArray

from encoders.cooccurrence import sample_next_pairs
from feature_repo.home import Home
from feature_repo.manifest import DataManifest
from feature_repo.query_engine import query_engine

MIN_EVENTS = 10_000
"""Events wanted before the first training impression. With 100 steps of 512 texts, fewer would let
every event's text be seen five times and more, and what is learned would be chance."""
MAX_PAIRS = 2000
"""Pairs of the measure, whose cost is that of encoding 4,000 texts; its standard error is about
.007."""

Encode = Callable[[list[str]], NDArray[np.float32]]
"""Texts -> float32 [n, D]."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_TRAINING = """
SELECT epoch_us(min(event_timestamp)) FROM read_parquet($impressions)
WHERE split IN ('train', 'extra')
"""
_NUM_EVENTS = "SELECT count(*) FROM read_parquet($events) WHERE event_timestamp < $until"
_SEEN_LABELS = """
SELECT split, count(*) FROM read_parquet($impressions)
WHERE event_timestamp < $until GROUP BY split ORDER BY min(event_timestamp)
"""


def choose_until(home: Home, manifest: DataManifest, *, min_events: int = MIN_EVENTS) -> datetime:
    """The moment before which events are used where the user names none.

    Returns:
        The first training impression's time, UTC; where fewer than ``min_events`` events lie before
        it, or there is no training impression, the start of the validation period.
    """
    if not home.impressions.exists():
        return manifest.split.valid
    with query_engine() as connection:
        first = connection.execute(
            _FIRST_TRAINING, {"impressions": str(home.impressions)}
        ).fetchone()[0]
        if first is None:
            return manifest.split.valid
        until = _EPOCH + timedelta(microseconds=first)
        num_events = connection.execute(
            _NUM_EVENTS, {"events": str(home.events / "*.parquet"), "until": until}
        ).fetchone()[0]
    return until if num_events >= min_events else manifest.split.valid


def seen_labels(home: Home, until: datetime) -> dict[str, int]:
    """How many impressions of each split lie before ``until``: an encoder tuned so saw them."""
    if not home.impressions.exists():
        return {}
    with query_engine() as connection:
        rows = connection.execute(
            _SEEN_LABELS, {"impressions": str(home.impressions), "until": until}
        ).fetchall()
    return dict(rows)


def held_out_pairs(home: Home, manifest: DataManifest, until: datetime) -> list[tuple[str, str]]:
    """Texts with one of the same user's next basket each, from the time after ``until``.

    That time ends where the next period of the split begins: tuning that stops before the
    validation period is not measured on it, and nothing is ever measured on the test period.

    Returns:
        At most :data:`MAX_PAIRS`; none if ``until`` lies in the test period.
    """
    ends = [end for end in (manifest.split.valid, manifest.split.test) if end > until]
    if not ends:
        return []
    return sample_next_pairs(home, start=until, stop=ends[0], num=MAX_PAIRS)


def next_basket_auc(pairs: list[tuple[str, str]], encode: Encode) -> float | None:
    """How well nearness tells the next basket: 0.5 = by chance, 1 = always.

    The share of the other pairs' second texts that are farther from a pair's first text than its
    own second text, by cosine; the mean over the pairs. The others come as often as people did
    them, so that popularity alone tells nothing; the pair's own two texts are left out, and equally
    near is not farther.

    Returns:
        In [0, 1]; None without pairs.
    """
    if not pairs:
        return None
    texts = sorted({text for pair in pairs for text in pair})
    place = {text: index for index, text in enumerate(texts)}
    vectors = encode(texts)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    first = np.array([place[a] for a, _ in pairs])
    second = np.array([place[b] for _, b in pairs])
    own = (vectors[first] * vectors[second]).sum(axis=1, keepdims=True)
    others = vectors[first] @ vectors[second].T
    counted = (second != first[:, None]) & (second != second[:, None])
    farther = ((others < own) & counted).sum(axis=1)
    return float((farther / counted.sum(axis=1).clip(min=1)).mean())
