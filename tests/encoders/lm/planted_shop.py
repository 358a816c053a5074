"""A home with a small shop's tables: orders of described items over 120 days, split by time."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_repo.behavior import hash63_array
from feature_repo.home import Home
from feature_repo.manifest import ItemColumn
from tests.encoders.planted import DAY, START, TIME, manifest

NUM_DAYS = 120
COLORS = ["red", "white", "antique blue", "pale pink", "ivory"]
THINGS = ["hanging heart", "t-light holder", "lunch bag", "cake stand", "tea towel"]
TITLES = [f"{color} {thing} set of {n}" for color in COLORS for thing in THINGS for n in (3, 12)]

Line = tuple[str, Any, str, str]
"""user, time, scene, text"""
Item = tuple[str, Any, str, float | None, str | None]
"""id, time of the version, text, price, category"""


def orders(*, first_day: int = 0, num_days: int = NUM_DAYS, seed: int = 0) -> list[Line]:
    """Every user buys three items every fourth day, and now and then sends one back."""
    random = np.random.default_rng(seed)
    lines: list[Line] = []
    for user in range(6):
        for day in range(first_day + user % 4, first_day + num_days, 4):
            time = START + day * DAY + timedelta(hours=9)
            chosen = random.choice(TITLES, size=3, replace=False)
            lines += [(f"user{user}", time, "buy", str(text)) for text in chosen]
            if day % 5 == 0:
                lines.append((f"user{user}", time, "return", str(chosen[0])))
    return lines


def items(*, first_day: int = 0, num_days: int = NUM_DAYS) -> list[Item]:
    """Every title is an item that is listed on a day of its own; every third has no category."""
    return [
        (
            f"item{place}",
            START + (first_day + place * num_days // len(TITLES)) * DAY,
            title,
            1.25 + place,
            None if place % 3 == 0 else "home & gifts",
        )
        for place, title in enumerate(TITLES)
    ]


def make_shop(
    root: Path, lines: Sequence[Line] | None = None, versions: Sequence[Item] | None = None
) -> Home:
    """Write the tables as ingest would."""
    lines = orders() if lines is None else lines
    versions = items() if versions is None else versions
    home = Home(root)
    home.events.mkdir(parents=True)
    for bucket in range(2):
        rows = sorted(line for line in lines if int(line[0][-1]) % 2 == bucket)
        table = {
            "user_id": pa.array([row[0] for row in rows], pa.string()),
            "event_timestamp": pa.array([row[1] for row in rows], TIME),
            "scene": pa.array([row[2] for row in rows], pa.string()),
            "behavior_id": hash63_array(row[3] for row in rows),
        }
        pq.write_table(pa.table(table), home.events / f"part-{bucket:05}.parquet")
    texts = sorted({line[3] for line in lines} | {item[2] for item in versions})
    behaviors = {"behavior_id": hash63_array(texts), "text": pa.array(texts, pa.string())}
    pq.write_table(pa.table(behaviors), home.behaviors)
    listed = {
        "item_id": pa.array([item[0] for item in versions], pa.string()),
        "event_timestamp": pa.array([item[1] for item in versions], TIME),
        "text_id": hash63_array(item[2] for item in versions),
        "price": pa.array([item[3] for item in versions], pa.float32()),
        "shelf": pa.array([item[4] for item in versions], pa.string()),
    }
    pq.write_table(pa.table(listed), home.items)
    times = [line[1] for line in lines] or [START]
    columns = (
        ItemColumn(name="price", kind="numeric"),
        ItemColumn(name="shelf", kind="categorical"),
    )
    told = manifest(min(times), max(times))
    told = told.model_copy(update={"scenes": ("buy", "return"), "item_columns": columns})
    told.save(home.manifest)
    return home
