"""A home of a small shop in which titles tell columns and users buy by a rule.

Items are "<colour> <thing>": the thing decides the price, the colour the shelf. Each user has a
colour, and buys two things in it each day, in the order of the things.
"""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_repo.behavior import hash63, hash63_array
from feature_repo.home import Home
from feature_repo.manifest import DataManifest, ItemColumn, Split

COLORS = ("red", "blue", "green", "black")
THINGS = tuple(
    f"{kind} {what}" for kind in ("oak", "tin") for what in ("cup", "bowl", "lamp", "box", "tray")
)
TITLES = [f"{color} {thing}" for color in COLORS for thing in THINGS]
START = datetime(2024, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
VALID, TEST = START + 20 * DAY, START + 24 * DAY
NUM_DAYS = 28
NEW = ("new red lamp", "new blue lamp")
"""Titles of items that appear in the test period."""
TIME = pa.timestamp("us", tz="UTC")


def price_of(title: str) -> float:
    return 1.5 * (1 + THINGS.index(title.split(" ", 1)[1])) if title in TITLES else 4.0


def bought(user: int, day: int) -> list[str]:
    """What a user buys on a day: two things of the own colour, the next ones."""
    color = COLORS[user % len(COLORS)]
    return [f"{color} {THINGS[(2 * day + n + user // 4) % len(THINGS)]}" for n in (0, 1)]


def make_home(root: Path, *, searches: bool = False, num_users: int = 12) -> Home:
    """Write the canonical tables.

    Args:
        root: The folder.
        searches: With a scene of searches: the thing that is bought a minute later.
        num_users: Who buy.
    """
    home = Home(root)
    home.events.mkdir(parents=True)
    events: list[tuple[str, datetime, str, str, str | None]] = []
    for day in range(NUM_DAYS):
        for user in range(num_users):
            moment = START + day * DAY + timedelta(minutes=user)
            basket = bought(user, day)
            events += [(f"u{user}", moment, "purchase", text, f"item {text}") for text in basket]
            if searches:
                query = basket[0].split(" ")[-1]
                events.append((f"u{user}", moment - timedelta(minutes=1), "search", query, None))
    users, times, scenes, texts, item_ids = zip(*events, strict=True)
    columns = {
        "user_id": list(users),
        "event_timestamp": pa.array(times, TIME),
        "scene": list(scenes),
        "behavior_id": hash63_array(texts),
        "item_id": pa.array(item_ids, pa.string()),
    }
    pq.write_table(pa.table(columns), home.events / "part-00000.parquet")
    rows = [(title, START) for title in TITLES]
    rows += [(title, START + 5 * DAY) for title in TITLES]  # a version with another price
    rows += [(title, TEST + DAY) for title in [*NEW, *TITLES]]
    items = {
        "item_id": [f"item {title}" for title, _ in rows],
        "event_timestamp": pa.array([time for _, time in rows], TIME),
        "text_id": hash63_array(title for title, _ in rows),
        # Only the version that is the last before the validation period tells the price.
        "price": pa.array(
            [price_of(t) if time == START + 5 * DAY or t in NEW else 99.0 for t, time in rows],
            pa.float32(),
        ),
        "shelf": [f"shelf of {title.split(' ')[0]}" for title, _ in rows],
        "code": [str(hash63(title)) for title, _ in rows],
        "stock": pa.array(np.ones(len(rows)), pa.float32()),
    }
    pq.write_table(pa.table(items), home.items)
    distinct = sorted({*texts, *TITLES, *NEW})
    behaviors = {
        "behavior_id": hash63_array(distinct),
        "text": distinct,
        "first_seen": pa.array([START] * len(distinct), TIME),
        "num_events": np.ones(len(distinct), dtype=np.int64),
    }
    pq.write_table(pa.table(behaviors), home.behaviors)
    scenes_there = ("purchase", "search") if searches else ("purchase",)
    _manifest(scenes_there, len(events), num_users).save(home.manifest)
    return home


def _manifest(scenes: tuple[str, ...], num_events: int, num_users: int) -> DataManifest:
    return DataManifest(
        dataset="shop",
        scenes=scenes,
        item_columns=(
            ItemColumn(name="price", kind="numeric"),
            ItemColumn(name="shelf", kind="categorical"),
            ItemColumn(name="code", kind="categorical"),
            ItemColumn(name="stock", kind="numeric"),
        ),
        context_columns=(),
        impressions="none",
        negatives=None,
        split=Split(valid=VALID, test=TEST),
        replay=True,
        lowercase=True,
        availability_delay_us=1,
        label_delay_us=1,
        num_events=num_events,
        num_users=num_users,
        num_items=len(TITLES) + len(NEW),
        num_behaviors=1,
        num_impressions=0,
        num_rejected=0,
        first_event=START,
        last_event=START + NUM_DAYS * DAY,
        num_buckets=1,
        source_fingerprint="0",
    )
