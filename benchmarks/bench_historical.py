"""Historical features of 100,000 impressions, and materialising them: time and peak memory.

Every case runs in a process of its own on one home: 1,000,000 events of 4,000 users, which make
400,000 snapshots of the last 100 behaviours. ``fast`` is the reader's own join, ``feast`` Feast's
historical retrieval over the same files; the two must return equal bytes. ``materialize`` copies
the latest rows of few and of many users; its memory must not grow with their number.

    python -m benchmarks.bench_historical
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.process_memory import peak_bytes
from benchmarks.results_file import given_command, write_result
from feature_repo.dataset import load_dataset
from feature_repo.home import Home
from feature_repo.ingest import ingest
from feature_repo.item_neighbors import build_item_neighbors
from feature_repo.item_stats import build_item_stats
from feature_repo.manifest import load_manifest
from feature_repo.materialize import apply, materialize
from feature_repo.progress import silent
from feature_repo.reader import FeatureReader
from feature_repo.sequences import build_sequences
from feature_repo.user_stats import build_user_stats

SNAPSHOTS_PER_USER = 100
TOML = """
name = "benchmark"
replay = true
[events]
sql = "SELECT * FROM '{dir}/events.parquet'"
[items]
sql = "SELECT DISTINCT item_id, text FROM '{dir}/events.parquet'"
[split]
valid = 2024-06-01
test = 2024-09-01
"""


def make_home(folder: Path, num_users: int, snapshots_per_user: int) -> Home:
    """A home with the user views built; one scene, baskets of one to four behaviours."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    num_baskets = num_users * snapshots_per_user
    basket = np.repeat(np.arange(num_baskets), rng.integers(1, 5, num_baskets))
    start = np.datetime64("2024-01-01", "us")
    moments = start + rng.integers(0, 366 * 86_400, num_baskets).astype("timedelta64[s]")
    item = rng.integers(0, 5000, len(basket))
    table = pa.table(
        {
            "user_id": np.char.add("u", (basket % num_users).astype(str)),
            "event_timestamp": pa.array(moments[basket], pa.timestamp("us", "UTC")),
            "scene": ["purchase"] * len(basket),
            "text": np.char.add("article ", item.astype(str)),
            "item_id": item.astype(str),
        }
    )
    pq.write_table(table, folder / "events.parquet")
    (folder / "data.toml").write_text(TOML.replace("true", "true\nreject_threshold = 0.1"))
    home = Home(folder / "home")
    ingest(home, load_dataset(folder / "data.toml", data_dir=folder))
    manifest = load_manifest(home)
    for build in (build_sequences, build_user_stats, build_item_stats, build_item_neighbors):
        build(home, manifest, silent)
    apply(home, "embedded")
    return home


def read(home: Home, num_requests: int, join: str) -> dict[str, Any]:
    """Sequences and statistics of random users at random times."""
    reader = FeatureReader(home)
    rng = np.random.default_rng(1)
    num_users = load_manifest(home).num_users
    users = np.char.add("u", rng.integers(0, num_users, num_requests).astype(str)).astype(object)
    day = 86_400_000_000
    times = int(np.datetime64("2024-03-01", "us").astype(np.int64)) + rng.integers(
        0, 300 * day, num_requests
    )
    began = time.perf_counter()
    features = reader.historical_users(users, times, join=join)  # type: ignore[arg-type]
    seconds = time.perf_counter() - began
    digest = hashlib.sha256(features.dense.tobytes())
    for sequence in features.sequences.values():
        for array in (sequence.behavior_ids, sequence.item_keys, sequence.timestamps):
            digest.update(array.tobytes())
    return {"seconds": seconds, "sha256": digest.hexdigest(), "found": int(features.found.sum())}


def copy(home: Home) -> dict[str, Any]:
    """All latest rows to an empty online store."""
    began = time.perf_counter()
    materialize(home, "embedded", full=True)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "users": load_manifest(home).num_users}


def _child(case: str, home: Path, num_requests: int) -> dict[str, Any]:
    """Run one case in a fresh process."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.bench_historical"]
    command += ["--case", case, "--home", str(home), "--num-requests", str(num_requests)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(case, result, file=sys.stderr)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-requests", type=int, default=100_000)
    parser.add_argument("--num-users", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", choices=["open", "fast", "feast", "materialize"])
    parser.add_argument("--home", type=Path)
    options = parser.parse_args()
    if options.case:
        home = Home(options.home)
        if options.case == "open":
            FeatureReader(home)
            result: dict[str, Any] = {}
        elif options.case == "materialize":
            result = copy(home)
        else:
            result = read(home, options.num_requests, options.case)
        print(json.dumps({**result, "peak_mib": peak_bytes() / 2**20}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        home = make_home(folder, options.num_users, SNAPSHOTS_PER_USER)
        rows = sum(pq.read_metadata(f).num_rows for f in home.view("user_sequences").glob("*.p*"))
        number = options.num_requests
        idle = _child("open", home.root, number)
        fast = [_child("fast", home.root, number) for _ in range(options.repeats)]
        feast = _child("feast", home.root, number)
        copies = {}
        for users in (5_000, 20_000, 80_000):
            part = folder / str(users)
            part.mkdir()
            copies[users] = _child("materialize", make_home(part, users, 8).root, 0)
    if fast[0]["sha256"] != feast["sha256"]:
        raise SystemExit("the two joins differ: no result was written")
    seconds = sorted(run["seconds"] for run in fast)
    write_result(
        "historical",
        given_command("bench_historical"),
        {
            "num_requests": number,
            "num_snapshots": rows,
            "sequence_length": 100,
            "fast_seconds_median": seconds[len(seconds) // 2],
            "fast_seconds": seconds,
            "fast_peak_mib": max(run["peak_mib"] for run in fast),
            "feast_seconds": feast["seconds"],
            "feast_peak_mib": feast["peak_mib"],
            "speedup_vs_feast": feast["seconds"] / seconds[len(seconds) // 2],
            "equal_bytes": True,
            "process_peak_mib_after_import": idle["peak_mib"],
            "materialize": copies,
        },
    )


if __name__ == "__main__":
    main()
