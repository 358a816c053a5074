r"""PostgreSQL and Redis: COPY, historical reads, materialise and lookups against the bare servers.

Real servers run on loopback for the time of the benchmark; every case is a process of its own.

- ``materialize``: rows of two kinds (2 x 100 int64, 384 float32) from parquet files into an empty
  Redis, by ours, by stock Feast, and, as the limit of this Redis, from bytes that were made before:
  through a redis-py pipeline and as hand-written RESP.
- ``lookups``: one user's row and 500 vectors, by ours, by Feast's public call, and by a bare HMGET
  whose bytes are parsed.
- ``from_postgres``: a home of many users and 20 snapshots of each is loaded into PostgreSQL and
  materialised from there into an empty Redis; the users' sequences by stock Feast, too, in turns.
- ``copy``, ``online`` and ``historical``: a home of 250 events and 100 snapshots per user is loaded
  into PostgreSQL; one user and 500 items are read as serving does, on both profiles; requests are
  read by ours on both profiles and by Feast's own join, which must agree, each with its peak of
  memory, the median of three but for the largest.

    python -m benchmarks.bench_production --num-rows 100000 --num-requests 10000 100000 1000000 \
        --num-users 4000
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import redis
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.data_format import ParquetFormat
from feast.protos.feast.types.Value_pb2 import Value
from feast.types import Array, Float32, Int64, String
from numpy.typing import NDArray

from benchmarks.bench_historical import SNAPSHOTS_PER_USER, make_home
from benchmarks.process_memory import peak_bytes
from benchmarks.results_file import given_command, write_result
from feature_repo.catalog import Catalog
from feature_repo.connections import DATABASE_URL, REDIS_URL
from feature_repo.feast_bytes import column_from_bytes, time_bytes, value_bytes
from feature_repo.home import Home
from feature_repo.manifest import load_manifest
from feature_repo.materialize import apply, feast_in_log, materialize
from feature_repo.offline import open_offline
from feature_repo.online import open_writer
from feature_repo.online_copy import CopyState, ViewCopy
from feature_repo.postgres_load import load_tables
from feature_repo.postgres_session import Database
from feature_repo.profiles import open_store
from feature_repo.progress import silent
from feature_repo.reader import FeatureReader
from feature_repo.redis_lookup import RedisLookup, ViewLayout
from feature_repo.services.postgres import PostgresServer
from feature_repo.services.processes import free_port
from feature_repo.services.redis import RedisServer

LIST_LENGTH, WIDTH = 100, 384
NOW = datetime(2024, 6, 1, tzinfo=UTC)
START = datetime(2024, 1, 1, tzinfo=UTC)
VECTORS_PER_LOOKUP = 500
ITEMS_PER_LOOKUP = 500
COPIED_SNAPSHOTS_PER_USER = 20
_STOCK_VIEW = "user_sequences"
WRITERS = ("ours", "stock", "pipeline", "resp")
_BATCH = 2000
_WARM_LOOKUPS = 20


def make_views(folder: Path) -> dict[str, FeatureView]:
    """The two kinds of rows."""
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
    text = Entity(name="text", join_keys=["text_id"], value_type=ValueType.INT64)
    lists = [Field(name=name, dtype=Array(Int64)) for name in ("ids", "keys")]
    vector = Field(name="embedding", dtype=Array(Float32))
    kinds = {
        "sequences": (user, [Field(name="user_id", dtype=String), *lists]),
        "vectors": (text, [Field(name="text_id", dtype=Int64), vector]),
    }
    return {
        name: FeatureView(
            name=name,
            entities=[entity],
            ttl=timedelta(days=36_500),
            schema=schema,
            source=FileSource(
                name=f"{name}_source",
                path=str(folder / name / "*.parquet"),
                file_format=ParquetFormat(),
                timestamp_field="event_timestamp",
                created_timestamp_column="created_timestamp",
            ),
        )
        for name, (entity, schema) in kinds.items()
    }


def make_rows(folder: Path, num_rows: int) -> None:
    """One part of each kind, random numbers as hashes are."""
    rng = np.random.default_rng(0)
    times = pa.array(
        np.datetime64("2024-01-01", "us") + rng.integers(0, 100 * 86_400 * 10**6, num_rows),
        pa.timestamp("us", tz="UTC"),
    )
    moments = {"event_timestamp": times, "created_timestamp": times}

    def lists(flat: NDArray[Any], length: int) -> pa.Array:
        return pa.ListArray.from_arrays(np.arange(0, len(flat) + 1, length, dtype=np.int32), flat)

    hashes = [rng.integers(0, 2**63, num_rows * LIST_LENGTH) for _ in range(2)]
    tables = {
        "sequences": {
            "user_id": [f"user-{n}" for n in range(num_rows)],
            "ids": lists(hashes[0], LIST_LENGTH),
            "keys": lists(hashes[1], LIST_LENGTH),
        },
        "vectors": {
            "text_id": rng.integers(0, 2**63, num_rows),
            "embedding": lists(rng.normal(size=num_rows * WIDTH).astype(np.float32), WIDTH),
        },
    }
    for name, columns in tables.items():
        (folder / name).mkdir(parents=True)
        table = pa.table({**columns, **moments})
        pq.write_table(table, folder / name / "part.parquet", row_group_size=20_000)


def small_store(folder: Path) -> FeatureStore:
    """A store over the rows of :func:`make_rows`; Feast's settings are the fastest it has."""
    config = RepoConfig(
        project="benchmark",
        provider="local",
        registry={"registry_type": "sql", "path": f"sqlite:///{folder}/registry.db"},
        offline_store={"type": "duckdb"},
        online_store={
            "type": "redis",
            "connection_string": os.environ[REDIS_URL].split("//")[1].split("/")[0],
            "skip_dedup": True,
        },
        materialization={"pull_latest_features": True, "online_write_batch_size": _BATCH},
        entity_key_serialization_version=3,
        repo_path=folder,
    )
    return FeatureStore(config=config)


def write_rows(folder: Path, how: str, kind: str, num_workers: int) -> dict[str, Any]:
    """Fill an empty Redis with one kind; seconds and rows."""
    store = small_store(folder)
    view = store.get_feature_view(kind)
    with redis.Redis.from_url(os.environ[REDIS_URL]) as client:
        client.flushall()
        if how == "ours":
            copy = ViewCopy(
                store, open_offline(store), open_writer(store), view, NOW, lambda: NOW, num_workers,
                _forget, silent,
            )  # fmt: skip
            began = time.perf_counter()
            copy.run(None, full=False)
        elif how == "stock":
            began = time.perf_counter()
            with feast_in_log():
                store.materialize(START, NOW, feature_views=[kind])
        else:
            rows = serialized(folder, ViewLayout.of(store, view), kind)
            began = time.perf_counter()
            (through_pipeline if how == "pipeline" else through_resp)(client, rows)
        seconds = time.perf_counter() - began
        num_rows = int(client.info("keyspace")["db0"]["keys"])
    num_rows -= how == "ours"  # the mark
    return {"rows": num_rows, "seconds": seconds, "rows_per_s": num_rows / seconds}


def _forget(_state: CopyState) -> None:
    """Keep no record: every run fills an empty store."""


def serialized(folder: Path, layout: ViewLayout, kind: str) -> list[list[bytes]]:
    """Key, then fields and values of every row, as Feast's bytes."""
    key = "user_id" if kind == "sequences" else "text_id"
    rows: list[list[bytes]] = []
    for batch in pq.ParquetFile(folder / kind / "part.parquet").iter_batches(_BATCH):
        keys = layout.codec.encode(batch.column(key).to_pylist())
        times = np.asarray(batch.column("event_timestamp").cast(pa.int64()))
        columns = [[layout.time] * len(keys), time_bytes(times)]
        for name, (field, what) in layout.features.items():
            columns += [[field] * len(keys), value_bytes(batch.column(name), what)]
        rows += [list(row) for row in zip(keys, *columns, strict=True)]
    return rows


def through_pipeline(client: Any, rows: list[list[bytes]]) -> None:
    """The limit of redis-py."""
    for start in range(0, len(rows), _BATCH):
        with client.pipeline(transaction=False) as pipe:
            for row in rows[start : start + _BATCH]:
                pipe.execute_command("HSET", *row)
            pipe.execute()


def through_resp(client: Any, rows: list[list[bytes]]) -> None:
    """The limit of Redis: the protocol's bytes, written by hand."""
    connection = client.connection_pool.get_connection()
    for start in range(0, len(rows), _BATCH):
        pieces: list[bytes] = []
        part = rows[start : start + _BATCH]
        for row in part:
            pieces.append(b"*%d\r\n$4\r\nHSET\r\n" % (len(row) + 1))
            for word in row:
                pieces += (b"$%d\r\n" % len(word), word, b"\r\n")
        connection.send_packed_command([b"".join(pieces)])
        for _ in part:
            connection.read_response()
    client.connection_pool.release(connection)


def lookups(folder: Path, repeats: int) -> dict[str, Any]:
    """Milliseconds of one user's row and of 500 vectors; both kinds must be online."""
    store = small_store(folder)
    rng = np.random.default_rng(2)
    figures: dict[str, Any] = {}
    with redis.Redis.from_url(os.environ[REDIS_URL]) as client:
        for kind, key, size in (
            ("sequences", "user_id", 1), ("vectors", "text_id", VECTORS_PER_LOOKUP),
        ):  # fmt: skip
            view = store.get_feature_view(kind)
            features = [feature.name for feature in view.features]
            layout = ViewLayout.of(store, view)
            lookup = RedisLookup(store, [(view, features)])
            keys = pq.read_table(folder / kind, columns=[key])[key].to_pylist()
            fields = [layout.time, *(layout.features[name][0] for name in features)]
            what = layout.features[features[0]][1]
            wanted = np.int64 if kind == "sequences" else np.float32

            def ours(asked: list[Any]) -> list[Any]:
                ((times, columns),) = lookup.read(asked)  # noqa: B023
                return [column_from_bytes(c, times != 0, what) for c in columns]  # noqa: B023

            def bare(asked: list[Any]) -> list[Any]:
                with client.pipeline(transaction=False) as pipe:
                    for name in layout.codec.encode(asked):  # noqa: B023
                        pipe.hmget(name, fields)  # noqa: B023
                    rows = pipe.execute()
                return [
                    np.array(getattr(Value.FromString(v), what).val, wanted)  # noqa: B023
                    for row in rows
                    for v in row[1:]
                ]

            def feast(asked: list[Any]) -> Any:
                return store.get_online_features(
                    features=[f"{kind}:{name}" for name in features],  # noqa: B023
                    entity_rows=[{key: value} for value in asked],  # noqa: B023
                ).proto

            asked = [
                [keys[n] for n in rng.integers(0, len(keys), size)]
                for _ in range(repeats + _WARM_LOOKUPS)
            ]
            figures[kind] = _milliseconds({"bare": bare, "ours": ours, "feast": feast}, asked)
            figures[kind]["p99_vs_bare"] = (
                figures[kind]["ours"]["p99"] / figures[kind]["bare"]["p99"]
            )
    return figures


def _milliseconds(
    reads: dict[str, Callable[[list[Any]], Any]], asked: list[list[Any]]
) -> dict[str, dict[str, float]]:
    """Percentiles of each; in turns, so that the machine's mood meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in reads}
    for number, keys in enumerate(asked):
        for name, read in reads.items():
            began = time.perf_counter()
            read(keys)
            if number >= _WARM_LOOKUPS:
                seconds[name].append(time.perf_counter() - began)
    return {
        name: {f"p{q}": float(np.percentile(of, q) * 1e3) for q in (50, 99)}
        for name, of in seconds.items()
    }


def load(home: Home) -> dict[str, Any]:
    """COPY of every table into an empty database."""
    store = open_store(home, "production")
    began = time.perf_counter()
    tables = load_tables(home, Database(store.config.offline_store))
    seconds = time.perf_counter() - began
    rows = {table.name: table.num_rows for table in tables}
    size = sum(file.stat().st_size for file in home.root.rglob("*.parquet"))
    total = sum(rows.values())
    return {
        "rows": rows, "parquet_bytes": size, "seconds": seconds, "rows_per_s": total / seconds,
    }  # fmt: skip


def copy_home(home: Home, num_workers: int) -> dict[str, Any]:
    """`longtrail materialize` from PostgreSQL into an empty Redis."""
    done = materialize(home, "production", num_workers=num_workers)
    return {v.name: {"rows": v.num_rows, "rows_per_s": v.num_rows / v.seconds} for v in done}


def copy_stock(home: Home) -> dict[str, Any]:
    """The same of the users' sequences by stock Feast."""
    store = open_store(home, "production")
    began = time.perf_counter()
    with feast_in_log():
        store.materialize(
            datetime(2000, 1, 1, tzinfo=UTC),
            datetime.now(UTC),
            feature_views=[_STOCK_VIEW],
        )
    seconds = time.perf_counter() - began
    rows = load_manifest(home).num_users
    return {"rows": rows, "rows_per_s": rows / seconds}


def online(home: Home, profile: str, repeats: int) -> dict[str, Any]:
    """Milliseconds of one user and of 500 items, all features that a model can read."""
    if profile == "embedded":
        apply(home, profile)
        materialize(home, profile)
    reader = FeatureReader(home, profile)
    now, rng = datetime.now(UTC), np.random.default_rng(3)
    users = [f"u{n}" for n in range(load_manifest(home).num_users)]
    items = Catalog.load(home).item_ids
    figures = {}
    for name, ids, size, read in (
        ("user", np.array(users, dtype=object), 1, reader.online_users),
        ("items", items, ITEMS_PER_LOOKUP, reader.online_items),
    ):
        asked = [rng.choice(ids, size, replace=False) for _ in range(repeats + _WARM_LOOKUPS)]
        times = _milliseconds({"ours": lambda keys: read(keys, at=now)}, asked)  # noqa: B023
        figures[name] = times["ours"]
    return figures


def historical(home: Home, profile: str, join: str, num_requests: int) -> dict[str, Any]:
    """Sequences and statistics of random users at random times; a digest of all that was read.

    ``extra_mib`` is the memory on the way to the result, which must not grow with the requests: the
    peak without the result itself and without what the process held before.
    """
    reader = FeatureReader(home, profile)
    rng = np.random.default_rng(1)
    number = rng.integers(0, load_manifest(home).num_users, num_requests)
    users = np.char.add("u", number.astype(str)).astype(object)
    first = int(np.datetime64("2024-03-01", "us").astype(np.int64))
    times = first + rng.integers(0, 300 * 86_400_000_000, num_requests)
    before_mib = peak_bytes() / 2**20
    began = time.perf_counter()
    read = reader.historical_users(users, times, join=join)  # type: ignore[arg-type]
    seconds = time.perf_counter() - began
    peak_mib = peak_bytes() / 2**20
    arrays = [read.dense]
    for sequence in read.sequences.values():
        arrays += [sequence.behavior_ids, sequence.item_keys, sequence.timestamps]
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(memoryview(np.ascontiguousarray(array)).cast("B"))
    result_mib = sum(array.nbytes for array in arrays) / 2**20
    return {
        "seconds": seconds,
        "rows_per_s": num_requests / seconds,
        "sha256": digest.hexdigest(),
        "result_mib": result_mib,
        "extra_mib": peak_mib - before_mib - result_mib,
    }


def _child(*case: object) -> dict[str, Any]:
    """Run one case in a fresh process."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.bench_production", "--case"]
    done = subprocess.run([*command, *map(str, case)], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(*case, result, file=sys.stderr)
    return result


def run_case(case: list[str]) -> dict[str, Any]:
    name, folder, *more = case
    if name == "write":
        how, kind, num_workers = more
        return write_rows(Path(folder), how, kind, int(num_workers))
    if name == "lookups":
        return lookups(Path(folder), int(more[0]))
    if name == "load":
        return load(Home(Path(folder)))
    if name == "copy":
        return copy_home(Home(Path(folder)), int(more[0]))
    if name == "copy_stock":
        return copy_stock(Home(Path(folder)))
    if name == "online":
        return online(Home(Path(folder)), more[0], int(more[1]))
    profile, join, num_requests = more
    return historical(Home(Path(folder)), profile, join, int(num_requests))


def measure_redis(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Materialise and lookups."""
    make_rows(folder, options.num_rows)
    views = make_views(folder)
    store = small_store(folder)
    store.apply(
        [
            Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING),
            Entity(name="text", join_keys=["text_id"], value_type=ValueType.INT64),
            *views.values(),
        ]
    )
    figures: dict[str, Any] = {}
    for kind in views:
        runs: dict[str, list[dict[str, Any]]] = {how: [] for how in WRITERS}
        for _ in range(options.repeats):  # in turns: the machine's mood meets all alike
            for how in WRITERS:
                runs[how].append(_child("write", folder, how, kind, options.num_workers))
        rates = {how: median(r["rows_per_s"] for r in of) for how, of in runs.items()}
        figures[kind] = {
            "rows_per_s": rates,
            "vs_stock": rates["ours"] / rates["stock"],
            "vs_pipeline_limit": rates["ours"] / rates["pipeline"],
            "peak_mib": {how: max(r["peak_mib"] for r in of) for how, of in runs.items()},
            "runs": [{"how": how, **run} for how, of in runs.items() for run in of],
        }
    # The last case left the vectors alone: both kinds are needed.
    with redis.Redis.from_url(os.environ[REDIS_URL]) as client:
        for kind, view in views.items():
            through_pipeline(client, serialized(folder, ViewLayout.of(store, view), kind))
    return {"materialize": figures, "lookups_ms": _child("lookups", folder, options.num_lookups)}


def measure_copy(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Materialise from PostgreSQL."""
    home = make_home(folder, options.num_copied_users, COPIED_SNAPSHOTS_PER_USER)
    apply(home, "production")
    load(home)
    cases = {"ours": ("copy", home.root, options.num_workers), "stock": ("copy_stock", home.root)}
    runs: dict[str, list[dict[str, Any]]] = {how: [] for how in cases}
    with redis.Redis.from_url(os.environ[REDIS_URL]) as client:
        for _ in range(options.repeats):  # in turns
            for how, case in cases.items():
                client.flushall()
                home.materialized("production").unlink(missing_ok=True)
                runs[how].append(_child(*case))
        client.flushall()
    views = {
        name: median(run[name]["rows_per_s"] for run in runs["ours"])
        for name in runs["ours"][0]
        if name != "peak_mib"
    }
    stock = median(run["rows_per_s"] for run in runs["stock"])
    return {
        "rows": {name: runs["ours"][0][name]["rows"] for name in views},
        "snapshots_per_user": COPIED_SNAPSHOTS_PER_USER,
        "rows_per_s": {"ours": views, "stock": {_STOCK_VIEW: stock}},
        "vs_stock": views[_STOCK_VIEW] / stock,
        "peak_mib": {how: max(run["peak_mib"] for run in of) for how, of in runs.items()},
        "runs": [{"how": how, **run} for how, of in runs.items() for run in of],
    }


def measure_postgres(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """COPY, online reads, historical reads."""
    home = make_home(folder, options.num_users, SNAPSHOTS_PER_USER)
    apply(home, "production")
    figures: dict[str, Any] = {
        "num_snapshots": sum(
            pq.read_metadata(f).num_rows for f in home.view("user_sequences").glob("*.parquet")
        ),
        "copy": _child("load", home.root),
        "historical": {},
    }
    materialize(home, "production")
    figures["online_ms"] = {
        profile: _child("online", home.root, profile, repeats)
        for profile, repeats in (("production", options.num_lookups), ("embedded", 200))
    }
    for num_requests in options.num_requests:
        last = num_requests == max(options.num_requests)
        repeats = 1 if last and len(options.num_requests) > 1 else options.repeats
        ways = {"production": ("production", "fast"), "embedded": ("embedded", "fast")}
        if num_requests <= options.num_feast_requests:
            ways["feast_postgres"] = ("production", "feast")
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for _ in range(repeats):  # in turns
            for way, (profile, join) in ways.items():
                runs[way].append(_child("historical", home.root, profile, join, num_requests))
        reads = {way: _median_run(of) for way, of in runs.items()}
        if "feast_postgres" in reads:
            reads["production"]["vs_feast"] = (
                reads["feast_postgres"]["seconds"] / reads["production"]["seconds"]
            )
        if len({read["sha256"] for read in reads.values()}) > 1:
            raise SystemExit("the reads differ: no result was written")
        figures["historical"][num_requests] = reads
    return figures


def _median_run(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run of median time, with the time of each."""
    ordered = sorted(runs, key=lambda run: float(run["seconds"]))
    return {**ordered[len(ordered) // 2], "all_seconds": [run["seconds"] for run in runs]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-rows", type=int, default=10_000, help="Of each kind into Redis.")
    parser.add_argument("--num-lookups", type=int, default=2000)
    parser.add_argument("--num-workers", type=int, default=1, help="Threads of ours.")
    parser.add_argument("--num-users", type=int, default=200, help="Of the home that is read.")
    parser.add_argument("--num-copied-users", type=int, default=20_000)
    parser.add_argument("--num-requests", type=int, nargs="+", default=[10_000])
    parser.add_argument(
        "--num-feast-requests", type=int, default=10_000, help="Most that Feast's join is asked."
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["redis", "postgres"])
    parser.add_argument("--no-result", action="store_true", help="Print the figures only.")
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps({**run_case(options.case), "peak_mib": peak_bytes() / 2**20}))
        return
    scratch = Path(tempfile.mkdtemp(prefix="longtrail-benchmark-")).resolve()
    scratch.chmod(0o711)  # PostgreSQL does not run as root
    cache = RedisServer(scratch / "redis", free_port(), "", settings=("appendonly no",))
    database = PostgresServer(scratch / "postgres", free_port(), "benchmark")
    figures: dict[str, Any] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # no server is left behind
    try:
        cache.start()
        os.environ[REDIS_URL] = cache.url
        if options.only != "postgres":
            figures |= measure_redis(scratch / "rows", options)
        if options.only != "redis":
            database.start()
            os.environ[DATABASE_URL] = database.url
            figures["from_postgres"] = measure_copy(scratch / "copied", options)
            figures |= measure_postgres(scratch / "read", options)
            with psycopg.connect(database.url) as connection:
                (version,) = connection.execute("SHOW server_version").fetchone() or ("",)
            figures["postgres_version"] = version
        with redis.Redis.from_url(cache.url) as client:
            figures["redis_version"] = client.info("server")["redis_version"]
    finally:
        cache.stop()
        database.stop()
        shutil.rmtree(scratch)
    print(json.dumps(figures))
    if not options.no_result:
        write_result("production", given_command("bench_production"), figures)


if __name__ == "__main__":
    main()
