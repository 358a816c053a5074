"""Homes with planted events: two groups of texts, each bought by its own users."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from encoders.cooccurrence import CoOccurrence
from feature_repo.behavior import hash63_array
from feature_repo.home import Home
from feature_repo.manifest import DataManifest, Split

START = datetime(2024, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
UNTIL = START + 60 * DAY
VALID = START + 80 * DAY
TEST = START + 100 * DAY
TIME = pa.timestamp("us", tz="UTC")

Event = tuple[str, datetime, str]
"""user, time, text"""

GROUPS = [[f"word{10 * g + i} word{80 + i}" for i in range(8)] for g in range(2)]
"""Two groups of texts that are bought together; the second words are no hint."""
TEXTS = [text for group in GROUPS for text in group]


def planted(first: datetime, num_days: int, seed: int) -> list[Event]:
    """Every user buys three texts of the own group a day."""
    random = np.random.default_rng(seed)
    return [
        (f"user{user}", first + day * DAY, str(text))
        for user in range(6)
        for day in range(num_days)
        for text in random.choice(GROUPS[user % 2], size=3, replace=False)
    ]


def make_home(root: Path, events: list[Event], impressions: dict[str, datetime]) -> Home:
    """A home with these events, and one impression per split at the given time."""
    home = Home(root)
    home.events.mkdir(parents=True)
    users, times, texts = zip(*events, strict=True)
    rows = pa.table(
        {
            "user_id": list(users),
            "event_timestamp": pa.array(times, TIME),
            "scene": ["view"] * len(events),
            "behavior_id": hash63_array(texts),
        }
    )
    half = len(events) // 2
    pq.write_table(rows.slice(0, half), home.events / "part-00000.parquet")
    pq.write_table(rows.slice(half), home.events / "part-00001.parquet")
    distinct = sorted(set(texts))
    behaviors = {
        "behavior_id": hash63_array(distinct),
        "text": distinct,
        "first_seen": pa.array([START] * len(distinct), TIME),
        "num_events": np.ones(len(distinct), dtype=np.int64),
    }
    pq.write_table(pa.table(behaviors), home.behaviors)
    splits, moments = list(impressions), list(impressions.values())
    pq.write_table(
        pa.table({"split": splits, "event_timestamp": pa.array(moments, TIME)}), home.impressions
    )
    manifest(min(times), max(times)).save(home.manifest)
    return home


def manifest(first: datetime, last: datetime) -> DataManifest:
    return DataManifest(
        dataset="planted",
        scenes=("view",),
        item_columns=(),
        context_columns=(),
        impressions="logged",
        negatives=None,
        split=Split(valid=VALID, test=TEST),
        replay=True,
        lowercase=True,
        availability_delay_us=1,
        label_delay_us=1,
        num_events=1,
        num_users=1,
        num_items=1,
        num_behaviors=1,
        num_impressions=1,
        num_rejected=0,
        first_event=first,
        last_event=last,
        num_buckets=2,
        source_fingerprint="0",
    )


def sparse(num_texts: int, pairs: dict[int, dict[int, float]]) -> CoOccurrence:
    """Counts text -> partner -> count, every text being in four baskets."""
    sizes = [len(pairs.get(row, {})) for row in range(num_texts)]
    items = [item for row in range(num_texts) for item in pairs.get(row, {}).items()]
    return CoOccurrence(
        behavior_ids=np.arange(num_texts),
        texts=[str(n) for n in range(num_texts)],
        num_baskets=np.full(num_texts, 4),
        starts=np.concatenate([[0], np.cumsum(sizes)]),
        partners=np.array([partner for partner, _ in items], dtype=np.int32),
        counts=np.array([count for _, count in items], dtype=np.float32),
        user_share=1.0,
    )
