"""How fast and in how much memory point-in-time sequences are built, on one core.

    python -m benchmarks.bench_sequences --num-events 1000000 --num-events 5000000

Events are generated into a temporary home folder; the build runs in a process of its own, bound to
one core with one engine thread, so that its peak memory is that of the build alone.
"""

import json
import multiprocessing
import os
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.process_memory import peak_bytes
from benchmarks.results_file import write_result
from feature_repo.home import Home
from feature_repo.manifest import SEQUENCE_LENGTH, DataManifest, Split, load_manifest
from feature_repo.progress import silent
from feature_repo.sequences import VIEW, build_sequences

SCENES = ("purchase", "search")
EVENTS_PER_BUCKET = 250_000
"""As ingest partitions events."""
MEAN_EVENTS_PER_USER = 60
NUM_TEXTS = 100_000
START = datetime(2025, 1, 1, tzinfo=UTC)
DAYS = 365
EVENT_COLUMNS = ("user_id", "event_timestamp", "scene", "behavior_id", "item_key")


def write_events(home: Home, num_events: int) -> None:
    """Generated events of a year: log-normal activity of users, popular and rare texts."""
    num_buckets = 1
    while num_buckets * EVENTS_PER_BUCKET < num_events:
        num_buckets *= 2
    home.events.mkdir(parents=True)
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 2**63 - 1, NUM_TEXTS)
    total = 0
    for bucket in range(num_buckets):
        size = num_events * (bucket + 1) // num_buckets - num_events * bucket // num_buckets
        activity = rng.lognormal(0.0, 1.5, max(1, size // MEAN_EVENTS_PER_USER))
        users = rng.choice(len(activity), size, p=activity / activity.sum())
        seconds = rng.integers(0, DAYS * 86_400, size) + int(START.timestamp())
        texts = np.minimum(rng.zipf(1.2, size), NUM_TEXTS) - 1
        table = pa.table(
            {
                "user_id": pa.array([f"{bucket}-{user}" for user in users]),
                "event_timestamp": pa.array(seconds * 1_000_000, pa.timestamp("us", tz="UTC")),
                "scene": pa.array(np.array(SCENES)[rng.integers(0, len(SCENES), size)]),
                "behavior_id": ids[texts],
                "item_id": pa.array([f"item {text}" for text in texts]),
                "item_key": ids[::-1][texts],
            }
        )
        table = table.sort_by([(name, "ascending") for name in EVENT_COLUMNS])
        pq.write_table(table, home.events / f"part-{bucket:05d}.parquet")
        total += size
    DataManifest(
        dataset="generated",
        scenes=SCENES,
        item_columns=(),
        context_columns=(),
        impressions="none",
        negatives=None,
        split=Split(valid=START + timedelta(days=300), test=START + timedelta(days=330)),
        replay=True,
        lowercase=True,
        availability_delay_us=1,
        label_delay_us=0,
        num_events=total,
        num_users=0,
        num_items=NUM_TEXTS,
        num_behaviors=NUM_TEXTS,
        num_impressions=0,
        num_rejected=0,
        first_event=START,
        last_event=START + timedelta(days=DAYS),
        num_buckets=num_buckets,
        source_fingerprint="generated",
    ).save(home.manifest)


def build(root: Path) -> dict[str, float]:
    """Build all sequences in this process; figures of time and memory."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    home = Home(root)
    manifest = load_manifest(home)
    summary = build_sequences(home, manifest, silent, threads=1)
    size_bytes = sum(path.stat().st_size for path in home.view(VIEW).glob("*.parquet"))
    return {
        "num_events": manifest.num_events,
        "num_rows": summary.num_rows,
        "seconds": round(summary.seconds, 2),
        "events_per_s": round(manifest.num_events / summary.seconds),
        "events_per_minute": round(60 * manifest.num_events / summary.seconds),
        "peak_rss_gib": round(peak_bytes() / 2**30, 3),
        "files_mb": round(size_bytes / 1e6, 1),
    }


def measure(num_events: int) -> dict[str, float]:
    """Generate events and build their sequences in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder))
        write_events(home, num_events)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(build, (home.root,))


@click.command()
@click.option(
    "--num-events",
    "sizes",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1_000_000, 5_000_000),
    show_default=True,
    help="Events to build sequences of; may be given several times.",
)
def main(sizes: tuple[int, ...]) -> None:
    """Measure and write the result file."""
    runs = [measure(size) for size in sizes]
    options = " ".join(f"--num-events {size}" for size in sizes)
    figures: dict[str, Any] = {
        "sequence_length": SEQUENCE_LENGTH,
        "num_scenes": len(SCENES),
        "cores_used": 1,
        "goal": {"events_per_minute": 1_000_000, "peak_rss_gib_at_5m_events": 2.0},
        "runs": runs,
    }
    path = write_result("sequences", f"python -m benchmarks.bench_sequences {options}", figures)
    click.echo(json.dumps({"result": path.name, **figures}))


if __name__ == "__main__":
    main()
