r"""`longtrail serve` under open-loop load, beside its bare parts and what one would build instead.

Load generator, Redis, PostgreSQL and servers share one machine. Every figure is of one run:

- ``cached``: ``/v1/rank`` with 500 candidates at a constant rate, users whose deep outputs are
  features; latency, errors, processor time and memory over the whole time.
- ``live``: the same with a behaviour more in each history, so that the deep half runs.
- ``parts``: reading the user's bytes through redis-py, the model's forward pass, JSON in and out,
  met in as many processes and as often as the workers meet them at the cached path's rate; against
  them the whole request at that rate. ``whole_to_parts`` takes evidence and programs for the
  forward pass, ``whole_to_programs`` the programs alone. ``alone``: both again at a rate at which
  no request meets another and processor and caches have gone to sleep in between.
- ``ours`` and ``rival``: the highest rates within the same limit of the 99th percentile. The rival
  is `feast serve` and :mod:`benchmarks.rival_server`, which must give the same scores.

    python -m benchmarks.bench_serving --home HOME --workers 2

``HOME`` is a home with a served run; it gets local servers of its own (`longtrail services`), and
what they lack is copied. Without ``--home`` the built-in shop is made and ``bahe_fast`` trained.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.load import LoadPlan, LoadResult, run_load
from benchmarks.results_file import given_command, write_result
from benchmarks.serving_parts import measure_parts
from benchmarks.serving_processes import Server, longtrail_server, rival_server, usage
from feature_repo.artifact import current_run, load_run_manifest
from feature_repo.catalog import Catalog
from feature_repo.connections import DATABASE_URL, REDIS_URL
from feature_repo.home import PROJECT_ROOT, Home
from feature_repo.manifest import load_manifest
from feature_repo.services import local

PROFILE = "production"
CACHED_LIMIT_MS = 15.0
LIVE_LIMIT_MS = 60.0
PATH, RIVAL_PATH = "/v1/rank", "/rank"
_SAMPLE_S = 5.0
_SAME_SCORE = 1e-4
_LOW_RATE = 10.0
"""Requests per second at which none waits for another."""


@dataclass(frozen=True)
class Requests:
    """Prepared bodies."""

    cached: tuple[str, ...]
    live: tuple[str, ...]
    num_ranked: int


def prepare_shop(root: Path) -> Home:
    """A home with the built-in shop and one trained run, of the recipe that is cheap to serve."""
    shop = root / "shop"
    for command in (
        ["shop", str(shop)],
        ["ingest", "feature_repo/datasets/shop.toml", "--data-dir", str(shop)],
        ["encode"],
        ["sequences"],
        ["train", "--recipe", "bahe_fast"],
        ["export"],
    ):
        _longtrail(Home(root), "embedded", command)
    return Home(root)


def bring_online(home: Home) -> None:
    """Load and copy what the production stores lack."""
    for command in (["sequences"], ["apply"], ["materialize"]):
        _longtrail(home, PROFILE, command)


def _longtrail(home: Home, profile: str, command: Sequence[str]) -> None:
    base = [sys.executable, "-m", "longtrail", "--home", str(home.root), "--profile", profile]
    print("longtrail", *command, file=sys.stderr)
    done = subprocess.run(
        [*base, *command], capture_output=True, text=True, check=False, cwd=PROJECT_ROOT
    )
    if done.returncode:
        raise SystemExit(f"longtrail {' '.join(command)} failed:\n{done.stderr[-2000:]}")


def make_requests(
    users: Sequence[str],
    items: Sequence[str],
    *,
    scene: str,
    num_requests: int,
    num_candidates: int,
    top_k: int,
) -> Requests:
    """Random users and candidates; the live ones with a behaviour of just now more.

    Args:
        users: Ids to choose from.
        items: Ids to choose from; fewer than ``num_candidates`` are all candidates.
        scene: Of the behaviour that the live ones have more.
        num_requests: Different ones, at least 1.
        num_candidates: Of each, all different.
        top_k: Items to return.
    """
    rng = np.random.default_rng(0)
    num_candidates = min(num_candidates, len(items))
    cached, live = [], []
    for user in rng.choice(users, num_requests):
        candidates = [items[row] for row in rng.choice(len(items), num_candidates, replace=False)]
        body = {"user_id": str(user), "candidates": candidates, "top_k": top_k}
        cached.append(json.dumps(body))
        added = [{"scene": scene, "item_id": items[int(rng.integers(len(items)))]}]
        live.append(json.dumps({**body, "changes": {"added": added}}))
    return Requests(tuple(cached), tuple(live), min(top_k, num_candidates))


def measure_load(server: Server, redis_pid: int, plan: LoadPlan) -> dict[str, Any]:
    """Run a plan; what it came to, with the processor time and memory of everyone."""
    samples: list[tuple[float, float, float]] = []
    server_cpu, redis_cpu = server.usage().cpu_s, usage(redis_pid).cpu_s
    began = time.monotonic()

    def watch() -> None:
        if not samples or time.monotonic() - began - samples[-1][0] >= _SAMPLE_S:
            now = server.usage()
            samples.append((time.monotonic() - began, now.own_mib, now.rss_mib))
        time.sleep(0.1)

    result = run_load(plan, meanwhile=watch)
    seconds = time.monotonic() - began
    warm = [sample for sample in samples if sample[0] >= plan.warm_up_s] or samples
    own = [own_mib for _, own_mib, _ in warm]
    print(f"{plan.rate:.0f}/s: {result}", file=sys.stderr)
    return {
        **asdict(result),
        "cpu_cores": {
            "server": (server.usage().cpu_s - server_cpu) / seconds,
            "redis": (usage(redis_pid).cpu_s - redis_cpu) / seconds,
            "generator": result.cpu_s / result.seconds,
        },
        "own_mib": {"start": own[0], "middle": own[len(own) // 2], "end": own[-1]},
        "rss_mib_end": warm[-1][2],
        "memory_samples": [[round(value, 2) for value in sample] for sample in samples],
    }


def highest_rate(
    measure: Callable[[float], LoadResult],
    *,
    limit_ms: float,
    start: float,
    lowest: float = 0.5,
    precision: float = 1.1,
) -> tuple[float, list[LoadResult]]:
    """The highest rate whose 99th percentile is within the limit, without an error.

    Doubles or halves from ``start``, then narrows down between the last good and the first bad.

    Args:
        measure: Puts a load of a rate on a server.
        limit_ms: Of the 99th percentile.
        start: First rate.
        lowest: Rate below which the answer is 0.
        precision: The first bad rate is at most this factor above the answer, above 1.

    Returns:
        The rate, and all results in the order of measuring.
    """
    results: list[LoadResult] = []

    def is_good(rate: float) -> bool:
        result = measure(rate)
        results.append(result)
        within = result.latency_ms.get("p99", math.inf) <= limit_ms
        return within and not result.num_errors

    good, bad, rate = 0.0, math.inf, start
    while good == 0.0 or bad == math.inf:
        if is_good(rate):
            good, rate = rate, rate * 2
        else:
            bad, rate = rate, rate / 2
        if rate < lowest:
            return 0.0, results
        if good and bad < math.inf:
            break
    while bad / good > precision:
        middle = math.sqrt(good * bad)
        if is_good(middle):
            good = middle
        else:
            bad = middle
    return good, results


def staircase(plan: LoadPlan, *, limit_ms: float, start: float) -> dict[str, Any]:
    """:func:`highest_rate` of a plan, as figures."""

    def measure(rate: float) -> LoadResult:
        result = run_load(replace(plan, rate=rate))
        p99 = result.latency_ms.get("p99", math.inf)
        print(f"  {rate:7.1f}/s p99 {p99:8.2f} ms {result.errors}", file=sys.stderr)
        return result

    rate, results = highest_rate(measure, limit_ms=limit_ms, start=start)
    return {"rate": rate, "limit_ms": limit_ms, "steps": [asdict(result) for result in results]}


def check_same_answers(ours: Server, rival: Server, bodies: Sequence[str]) -> float:
    """Largest difference of the best items' scores; both do the same work.

    Raises:
        SystemExit: If it is above 1e-4, or the best items are others.
    """
    largest = 0.0
    for body in bodies:
        first = {r["item_id"]: r["score"] for r in ask(ours, PATH, body)["ranked"]}
        second = {r["item_id"]: r["score"] for r in ask(rival, RIVAL_PATH, body)["ranked"]}
        differences = [abs(first[i] - second[i]) for i in first.keys() & second.keys()]
        # Of equal scores either may be the last one that is returned.
        largest = max(largest, *differences, abs(min(first.values()) - min(second.values())))
    if largest > _SAME_SCORE:
        raise SystemExit(f"ours and the rival's scores differ by {largest}: no result was written")
    return largest


def ask(server: Server, path: str, body: str) -> Any:
    """One answer, parsed."""
    request = urllib.request.Request(  # noqa: S310  # our own address
        server.url + path, body.encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        return json.loads(answer.read())


def measure_ours(
    home: Home, server: Server, redis_pid: int, requests: Requests, options: argparse.Namespace
) -> dict[str, Any]:
    """Cached, live, the parts, and the highest rate within the cached path's limit."""
    cached = LoadPlan(
        server.url, PATH, requests.cached, options.rate, options.seconds, requests.num_ranked,
        answer_path="cached", num_connections=options.connections,
    )  # fmt: skip
    live = replace(cached, bodies=requests.live, rate=options.live_rate, answer_path="live")
    figures: dict[str, Any] = {
        "cached": measure_load(server, redis_pid, cached),
        "live": measure_load(server, redis_pid, replace(live, seconds=options.live_seconds)),
    }
    answer = json.dumps(ask(server, PATH, requests.cached[0]))

    def against_parts(rate: float, whole_ms: float) -> dict[str, Any]:
        parts = measure_parts(
            home, PROFILE, requests.cached, answer,
            num=options.num_parts, rate=rate, workers=options.workers,
        )  # fmt: skip
        return {
            "rate": rate,
            "whole_ms": whole_ms,
            "ratio": whole_ms / parts["sum_ms"],
            "ratio_with_programs": whole_ms / parts["sum_with_programs_ms"],
            **parts,
        }

    alone = run_load(replace(cached, rate=_LOW_RATE, seconds=options.step_seconds))
    figures["parts"] = against_parts(options.rate, figures["cached"]["answer_ms"]["p50"])
    figures["alone"] = against_parts(_LOW_RATE, alone.answer_ms["p50"])
    step = replace(cached, seconds=options.step_seconds)
    figures["ours"] = staircase(step, limit_ms=CACHED_LIMIT_MS, start=options.rate)
    return figures


def measure_rival(
    home: Home, ours: Server, requests: Requests, options: argparse.Namespace, scratch: Path
) -> dict[str, Any]:
    """The rival's highest rates, and ours within the limit that the rival can meet."""
    figures: dict[str, Any] = {}
    for name, keep_items in (("rival", False), ("rival_kept_items", True)):
        with rival_server(
            home, PROFILE, scratch, workers=options.workers, keep_items=keep_items
        ) as rival:
            difference = check_same_answers(ours, rival, requests.cached[:10])
            plan = LoadPlan(
                rival.url, RIVAL_PATH, requests.cached, 1.0, options.step_seconds,
                requests.num_ranked, num_connections=options.connections,
            )  # fmt: skip
            # Alone it may already be slower than our limit: then both get what it can keep.
            alone = run_load(plan)
            limit_ms = max(CACHED_LIMIT_MS, 1.5 * alone.latency_ms["p99"])
            found = staircase(plan, limit_ms=limit_ms, start=options.rate / 10)
        step = LoadPlan(
            ours.url, PATH, requests.cached, options.rate, options.step_seconds,
            requests.num_ranked, num_connections=options.connections,
        )  # fmt: skip
        same_limit = staircase(step, limit_ms=limit_ms, start=options.rate)
        figures[name] = {
            **found,
            "alone": asdict(alone),
            "largest_difference": difference,
            "ours_at_its_limit": same_limit,
            "ratio": same_limit["rate"] / found["rate"] if found["rate"] else None,
        }
    return figures


def key_figures(figures: dict[str, Any]) -> dict[str, Any]:
    """What the goals are about; read before the raw numbers."""
    rival, kept = figures["rival"], figures["rival_kept_items"]
    own_mib = figures["cached"]["own_mib"]
    return {
        "cached_p99_ms": figures["cached"]["latency_ms"].get("p99"),
        "live_p99_ms": figures["live"]["latency_ms"].get("p99"),
        "errors": figures["cached"]["num_errors"] + figures["live"]["num_errors"],
        "whole_to_parts": figures["parts"]["ratio"],
        "whole_to_parts_alone": figures["alone"]["ratio"],
        "whole_to_programs": figures["parts"]["ratio_with_programs"],
        "our_rate": figures["ours"]["rate"],
        "rival_rate": rival["rate"],
        "rival_limit_ms": rival["limit_ms"],
        "our_rate_at_rival_limit": rival["ours_at_its_limit"]["rate"],
        "ratio": rival["ratio"],
        "ratio_to_rival_with_kept_items": kept["ratio"],
        "memory_growth_mib": own_mib["end"] - own_mib["middle"],
        # From the first sample after the warm-up: caches that still fill are in it.
        "memory_growth_from_start_mib": own_mib["end"] - own_mib["start"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--home", type=Path, help="With a served run; else the built-in shop.")
    parser.add_argument("--workers", type=int, default=2, help="Processes of each server.")
    parser.add_argument("--rate", type=float, default=200.0, help="Of the cached path, per second.")
    parser.add_argument("--seconds", type=float, default=300.0, help="Of the cached path.")
    parser.add_argument("--live-rate", type=float, default=20.0)
    parser.add_argument("--live-seconds", type=float, default=60.0)
    parser.add_argument("--step-seconds", type=float, default=20.0, help="Of a staircase's step.")
    parser.add_argument("--num-candidates", type=int, default=500)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--num-requests", type=int, default=500, help="Different ones.")
    parser.add_argument("--num-parts", type=int, default=300, help="Repetitions of a bare part.")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--option", action="append", default=[], help="Of `longtrail serve`.")
    parser.add_argument("--no-result", action="store_true", help="Print the figures only.")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # no server is left behind
    for variable in (DATABASE_URL, REDIS_URL):
        os.environ.pop(variable, None)
    with tempfile.TemporaryDirectory(prefix="longtrail-benchmark-") as folder:
        scratch = Path(folder).resolve()
        scratch.chmod(0o711)  # PostgreSQL does not run as root
        home = Home(options.home.resolve()) if options.home else prepare_shop(scratch / "home")
        local.hold(home)
        try:
            figures = run(home, scratch, options)
        finally:
            local.release(home)
    print(json.dumps(figures))
    if not options.no_result:
        write_result("serving", given_command("bench_serving"), figures)


def run(home: Home, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Everything, over the home's own stores."""
    bring_online(home)
    impressions = pq.read_table(home.impressions, columns=["user_id"])
    requests = make_requests(
        impressions["user_id"].unique().sort().to_pylist(),
        [str(item_id) for item_id in Catalog.load(home).item_ids],
        scene=load_manifest(home).scenes[-1],
        num_requests=options.num_requests,
        num_candidates=options.num_candidates,
        top_k=options.top_k,
    )
    redis_pid = local.status(home).redis.pid
    if redis_pid is None:
        raise SystemExit(f"no local Redis runs for {home.root}: its log says why")
    with longtrail_server(
        home, PROFILE, scratch, workers=options.workers, options=options.option
    ) as ours:
        figures = measure_ours(home, ours, redis_pid, requests, options)
        figures |= measure_rival(home, ours, requests, options, scratch)
    manifest, model = load_manifest(home), load_run_manifest(home, current_run(home))
    setting = {
        "dataset": manifest.dataset,
        "num_items": manifest.num_items,
        "num_users": manifest.num_users,
        "run": model.run,
        "sequence_length": model.sequence_length,
        "workers": options.workers,
        "num_candidates": options.num_candidates,
        "top_k": options.top_k,
        "rate": options.rate,
        "seconds": options.seconds,
        "live_rate": options.live_rate,
    }
    return {**key_figures(figures), "setting": setting, **figures}


if __name__ == "__main__":
    main()
