"""One contract for historical reads: files and a real PostgreSQL give the same rows."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import FeatureStore, FeatureView
from numpy.typing import NDArray

from feature_repo.definitions import define
from feature_repo.errors import MissingStepError, StoreError
from feature_repo.home import Home
from feature_repo.manifest import EncoderManifest
from feature_repo.offline import OfflineStore, open_offline
from feature_repo.postgres_load import load_tables
from feature_repo.postgres_session import Database
from feature_repo.profiles import open_store
from feature_repo.services.postgres import DATABASE, PostgresServer
from feature_repo.services.processes import free_port
from feature_repo.services.redis import RedisServer
from feature_repo.version_names import encoder_view
from feature_repo.view_reader import release_ibis
from tests.servers import PASSWORD

TIME = pa.timestamp("us", tz="UTC")
START = 1_700_000_000_000_000
"""Epoch microseconds."""
HOUR = 3_600_000_000
BIG = 2**53 + 1
PROFILES = ("embedded", "production")
ENCODER = EncoderManifest(
    model="a small stand-in", model_fingerprint="0", split_layer=1, pooling="mean", prompt="{text}",
    normalize=True, dtype="float32", max_tokens=8, width=3, fingerprint="abc",
)  # fmt: skip


def write_view(folder: Path, key: str, rows: list[dict[str, Any]], types: dict[str, Any]) -> None:
    """Two files of a view; ``at`` and ``created`` of a row are its times."""
    folder.mkdir(parents=True)
    schema = pa.schema(
        {key: pa.string(), "event_timestamp": TIME, "created_timestamp": TIME, **types}
    )
    if key == "behavior_id":
        schema = schema.set(0, pa.field(key, pa.int64()))
    for number in range(2):
        pq.write_table(
            pa.Table.from_pylist(rows[number::2], schema=schema), folder / f"part-{number}.parquet"
        )


def rows_of(key: str, keys: list[Any], values: Any) -> list[dict[str, Any]]:
    """Twelve rows a key, an hour apart; the fourth was corrected twice, at later moments."""
    rows = []
    for number, name in enumerate(keys):
        for hour in range(12):
            for correction in range(3 if hour == 3 else 1):
                at = START + hour * HOUR + number
                times = {"event_timestamp": at, "created_timestamp": at + correction}
                seed = 1000 * number + 10 * hour + correction
                rows.append({key: name, **times, **values(seed)})
    order = np.random.default_rng(0).permutation(len(rows))
    return [rows[place] for place in order]


VECTORS = encoder_view(ENCODER.fingerprint)
USERS = [f"u{n}" for n in range(40)] + ["Ünï cödé 'quoted\\", ""]
BEHAVIORS = [BIG + n for n in range(40)] + [2**63 - 1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home with files of three views, made by hand; no data set was ingested."""
    built = Home(tmp_path_factory.mktemp("offline") / "home")
    ids, vectors = pa.list_(pa.int64()), pa.list_(pa.float32())
    write_view(
        built.view("user_sequences"),
        "user_id",
        rows_of(
            "user_id",
            USERS,
            lambda seed: {
                "purchase_behavior_ids": [BIG + n for n in range(seed % 7)],
                "purchase_total": BIG + seed,
            },
        ),
        {"purchase_behavior_ids": ids, "purchase_total": pa.int64()},
    )
    write_view(
        built.view("user_stats"),
        "user_id",
        rows_of(
            "user_id",
            USERS,
            lambda seed: {
                "purchase_count_7d": None if seed % 3 == 0 else seed / 8,
                "purchase_last_time": seed / 3,
            },
        ),
        {"purchase_count_7d": pa.float32(), "purchase_last_time": pa.float64()},
    )
    write_view(
        built.embeddings / ENCODER.fingerprint,
        "behavior_id",
        rows_of(
            "behavior_id",
            BEHAVIORS,
            lambda seed: {"embedding": [seed / 7, -seed, 0.5], "encoder_fingerprint": "abc"},
        ),
        {"embedding": vectors, "encoder_fingerprint": pa.string()},
    )
    ENCODER.save(built.encoder)
    return built


def applied(home: Home, profile: str) -> FeatureStore:
    """The store of a profile with the home's definitions, and a view that expires soon."""
    store = open_store(home, profile)
    kind = store.config.offline_store.type
    if kind == "postgres":
        load_tables(home, Database(store.config.offline_store))
    definitions = define(home, kind)
    view = definitions.view("user_stats")
    short = FeatureView(
        name="short", entities=[definitions.entities[0]], ttl=timedelta(hours=2),
        schema=view.schema, source=view.batch_source,
    )  # fmt: skip
    store.apply([*definitions.entities, *definitions.views, short])
    return store


@pytest.fixture(scope="module")
def stores(
    home: Home, postgres: PostgresServer, redis_server: RedisServer
) -> Iterator[dict[str, FeatureStore]]:
    name = "test_offline"
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        # Sessions must not depend on the zone in which a database shows its times.
        connection.execute(f"CREATE DATABASE {name}")
        connection.execute(f"ALTER DATABASE {name} SET timezone = 'Asia/Kathmandu'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATABASE_URL", postgres.url.replace(f"/{DATABASE}?", f"/{name}?"))
        patch.setenv("REDIS_URL", redis_server.url)
        yield {profile: applied(home, profile) for profile in PROFILES}
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=PROFILES)
def store(request: pytest.FixtureRequest, stores: dict[str, FeatureStore]) -> FeatureStore:
    return stores[request.param]


@pytest.fixture
def offline(store: FeatureStore) -> OfflineStore:
    return open_offline(store)


@dataclass(frozen=True)
class Requests:
    """Keys and moments at, just before and just after those at which a row begins or expires."""

    keys: list[Any]
    times: NDArray[np.int64]

    @classmethod
    def around(cls, keys: list[Any], unknown: Any) -> "Requests":
        wanted = [
            (key, START + hour * HOUR + number + shift)
            for number, key in enumerate(keys)
            if number % 13 == 0 or number > 38
            for hour in (-1, 0, 3, 11, 13)
            for shift in (-2, -1, 0, 1)
        ]
        wanted += [(unknown, START + 5 * HOUR)] * 2 + wanted[:3]
        np.random.default_rng(1).shuffle(wanted)
        return cls([key for key, _ in wanted], np.array([int(t) for _, t in wanted]))


VIEWS = {
    "user_sequences": (Requests.around(USERS, "nobody"), None),
    "user_stats": (Requests.around(USERS, "nobody"), timedelta(days=36_500)),
    "short": (Requests.around(USERS, "nobody"), timedelta(hours=2)),
    VECTORS: (Requests.around(BEHAVIORS, 12), None),
}


def latest(offline: OfflineStore, view: str, columns: list[str]) -> list[dict[str, Any] | None]:
    """What each request gets, None where nothing."""
    requests, ttl = VIEWS[view]
    kind = pa.int64() if view == VECTORS else pa.string()
    keys = pa.array([int(k) for k in requests.keys] if kind == pa.int64() else requests.keys, kind)
    rows, place = offline.latest_rows(
        view, keys=keys, times=requests.times, ttl=ttl, columns=columns
    )
    assert rows.column_names == columns
    assert sorted(set(place.tolist()) - {-1}) == list(range(rows.num_rows))  # each row once
    found = rows.to_pylist()
    return [found[p] if p >= 0 else None for p in place]


def columns_of(store: FeatureStore, view: str) -> list[str]:
    names = {
        "user_sequences": ["purchase_total", "purchase_behavior_ids"],
        VECTORS: ["embedding", "encoder_fingerprint"],
    }
    return names.get(view, ["purchase_count_7d", "purchase_last_time"])


@pytest.mark.parametrize("view", VIEWS)
def test_the_row_of_each_request_by_hand(home: Home, store: FeatureStore, view: str) -> None:
    requests, ttl = VIEWS[view]
    columns = columns_of(store, view)
    folder = home.view("user_stats" if view == "short" else view)
    if view == VECTORS:
        folder = home.embeddings / ENCODER.fingerprint
    table = pa.concat_tables(pq.read_table(p) for p in sorted(folder.glob("*.parquet")))
    key = table.column_names[0]
    micros = {n: table[n].cast(pa.int64()).to_pylist() for n in table.column_names[1:3]}
    by_key: dict[Any, list[tuple[int, int, int]]] = {}
    for number, name in enumerate(table[key].to_pylist()):
        moment = micros["event_timestamp"][number]
        by_key.setdefault(name, []).append((moment, micros["created_timestamp"][number], number))
    rows = table.select(columns).to_pylist()
    expected: list[dict[str, Any] | None] = []
    lifetime = (ttl or timedelta(days=100_000)) // timedelta(microseconds=1)
    for name, time_us in zip(requests.keys, requests.times.tolist(), strict=True):
        past = [place for place in by_key.get(name, []) if place[0] <= time_us]
        newest = max(past, default=None)
        fresh = newest is not None and newest[0] + lifetime >= time_us
        expected.append(rows[newest[2]] if fresh and newest is not None else None)
    assert latest(open_offline(store), view, columns) == expected
    assert None in expected
    assert any(row is not None for row in expected)


@pytest.mark.parametrize("view", VIEWS)
def test_feasts_own_join_finds_the_same(store: FeatureStore, view: str) -> None:
    requests, _ = VIEWS[view]
    columns = columns_of(store, view)
    key = "behavior_id" if view == VECTORS else "user_id"
    entities = pd.DataFrame(
        {
            key: requests.keys,
            "event_timestamp": pd.to_datetime(requests.times, unit="us", utc=True),
            "request_row": range(len(requests.keys)),
        }
    )
    job = store.get_historical_features(
        entity_df=entities, features=[f"{view}:{column}" for column in columns]
    )
    table = job.to_arrow().sort_by("request_row")
    release_ibis()
    assert table["request_row"].to_pylist() == list(range(len(requests.keys)))
    nothing = dict.fromkeys(columns)
    ours = latest(open_offline(store), view, columns)
    assert [row or nothing for row in ours] == table.select(columns).to_pylist()


@pytest.mark.parametrize("batch_rows", [1, 7, 1000])
@pytest.mark.parametrize("view", ["user_sequences", VECTORS])
def test_newest_rows_of_a_range(
    stores: dict[str, FeatureStore], view: str, batch_rows: int
) -> None:
    start = datetime.fromtimestamp(START / 1e6, UTC) + timedelta(hours=2)
    found = {}
    for profile, store in stores.items():
        num_keys, batches = open_offline(store).newest_rows(
            view,
            start=start,
            end=start + timedelta(hours=1, microseconds=20),
            batch_rows=batch_rows,
        )
        tables = list(batches)
        assert max(batch.num_rows for batch in tables) <= batch_rows
        rows = pa.Table.from_batches(tables).to_pylist()
        assert num_keys == len(rows) == len(USERS if view == "user_sequences" else BEHAVIORS)
        key = tables[0].schema.names[0]
        found[profile] = sorted(rows, key=lambda row, key=key: row[key])  # type: ignore[misc]
    assert found["embedded"] == found["production"]
    # The corrected rows are in the range for the first 21 keys, and the last correction counts.
    moments = {row["created_timestamp"] - row["event_timestamp"] for row in found["embedded"]}
    assert moments == {timedelta(0), timedelta(microseconds=2)}


def test_questions_within_a_hold_share_one_session(
    stores: dict[str, FeatureStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    offline = open_offline(stores["production"])
    opened: list[Any] = []
    connect = Database.connect

    def counted(self: Database, **options: Any) -> Any:
        opened.append(connect(self, **options))
        return opened[-1]

    monkeypatch.setattr(Database, "connect", counted)
    with offline.held():
        parts = offline.parts("user_stats")
        offline.first_event("user_stats", parts)
        assert len(opened) == 1
        with pytest.raises(StoreError, match='column "nothing" does not exist'):
            offline.ask("user_stats", "SELECT nothing FROM {rows}")
        offline.parts("user_stats")
        assert len(opened) == 2  # after an error nobody knows its state
    assert all(session.closed for session in opened)
    offline.parts("user_stats")
    assert len(opened) == 3


def test_no_row_in_a_range(offline: OfflineStore) -> None:
    start = datetime(2030, 1, 1, tzinfo=UTC)
    num_keys, batches = offline.newest_rows("user_stats", start=start, end=start, batch_rows=10)
    assert (num_keys, list(batches)) == (0, [])
    rows, place = offline.latest_rows(
        "user_stats",
        keys=pa.array([], pa.string()),
        times=np.zeros(0, dtype=np.int64),
        ttl=None,
        columns=["purchase_count_7d"],
    )
    assert rows.schema.types == [pa.float32()]
    assert len(place) == 0


def test_parts_and_their_first_events(stores: dict[str, FeatureStore]) -> None:
    for view in ("user_stats", VECTORS):
        embedded, production = (open_offline(stores[profile]) for profile in PROFILES)
        parts = embedded.parts(view)
        assert list(parts) == ["part-0.parquet", "part-1.parquet"]
        assert production.parts(view) == parts
        for part in parts:
            first = embedded.first_event(view, [part])
            assert first.utcoffset() == timedelta(0)
            assert production.first_event(view, [part]) == first
            assert first >= datetime.fromtimestamp(START / 1e6, UTC)
    with pytest.raises(StoreError, match=r"holds no part part-9\.parquet any more"):
        production.first_event("user_stats", ["part-9.parquet"])


@pytest.mark.parametrize(("view", "step"), [("items", "sequences"), ("user_embeddings", "export")])
def test_a_view_that_was_not_built(offline: OfflineStore, view: str, step: str) -> None:
    offline.require("user_stats")
    assert offline.parts(view) == {}
    with pytest.raises(MissingStepError, match=f"of {view} yet: run `longtrail {step}` first"):
        offline.require(view)


def test_a_column_that_is_not_there_is_named(stores: dict[str, FeatureStore]) -> None:
    with pytest.raises(StoreError, match="has no column purchase_count_30d, which user_stats"):
        open_offline(stores["production"]).latest_rows(
            "user_stats",
            keys=pa.array(["u1"]),
            times=np.array([START]),
            ttl=None,
            columns=["purchase_count_30d"],
        )


@pytest.fixture
def own_server(scratch: Path) -> Iterator[PostgresServer]:
    """A server that may be killed."""
    server = PostgresServer(scratch / "postgres", free_port(), PASSWORD, settings=("fsync=off",))
    server.start()
    yield server
    server.stop()


def kill(server: PostgresServer) -> None:
    process = server.process()
    assert process is not None
    process.kill()
    process.wait()


def test_a_server_that_restarts_is_read_again(
    home: Home,
    own_server: PostgresServer,
    redis_server: RedisServer,
    stores: dict[str, FeatureStore],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("DATABASE_URL", own_server.url)
    monkeypatch.setenv("REDIS_URL", redis_server.url)
    store = applied(home, "production")
    offline = open_offline(store)
    columns = columns_of(store, "user_stats")
    expected = latest(open_offline(stores["embedded"]), "user_stats", columns)
    first = datetime.fromtimestamp(START / 1e6, UTC)
    _, batches = offline.newest_rows(
        "user_stats", start=first, end=first + timedelta(days=1), batch_rows=10
    )
    read = [next(batches)]
    kill(own_server)

    def restart() -> None:
        time.sleep(0.3)
        own_server.start()

    thread = threading.Thread(target=restart)
    thread.start()
    read += batches  # half read when the server was killed
    thread.join()
    assert sorted(name for batch in read for name in batch[0].to_pylist()) == sorted(USERS)
    assert latest(offline, "user_stats", columns) == expected
    assert "; reading again" in caplog.text

    kill(own_server)
    offline._database = Database(store.config.offline_store, patience_s=0.2)  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match="check the server and DATABASE_URL, then run this again"):
        offline.parts("user_stats")
    own_server.start()
    assert offline.parts("user_stats").keys() == {"part-0.parquet", "part-1.parquet"}
