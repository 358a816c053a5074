"""A small data set, what each step makes of it when nothing disturbs it, and copies to disturb.

The data set has enough texts for two files of vectors, and logged impressions to train on.
"""

import json
import shutil
import signal
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import redis
from psycopg import sql

from feature_repo.home import Home
from feature_repo.services.postgres import DATABASE, PostgresServer
from feature_repo.services.processes import stop_process
from feature_repo.services.redis import RedisServer
from tests.faults.commands import Command, Done, Event, Stop

DAY = 86_400
START = 1_704_067_200  # 2024-01-01
WORDS = 90
TIME = pa.timestamp("us", tz="UTC")
TOML = """
name = "faults"
replay = true
sequence_length = 10

[events]
sql = '''SELECT user_id, event_timestamp, scene, text, item_id FROM '{dir}/events.parquet' '''

[items]
sql = '''SELECT item_id, text, price, shelf FROM '{dir}/items.parquet' '''

[impressions]
sql = '''SELECT * FROM '{dir}/impressions.parquet' '''

[split]
valid = 2024-02-15
test = 2024-03-01
"""
RUN = "run"
COUNTED: dict[str, list[Event]] = {
    "ingest": ["call", "change"],
    "encode": ["call", "change"],
    "sequences": ["change"],
    "apply": ["call", "change"],
    "materialize": ["call", "change"],
    "train": ["change"],
}
"""Step -> the events at which it is stopped; to count calls makes ibis slow."""
_SETTINGS = {
    "sequence_length": 8,
    "model.deep_length": 8,
    "model.use_bfloat16": "false",
    # A larger head would make the export long, which every training here ends with.
    "model.use_text_evidence": "false",
    "model.use_target_attention": "false",
    "model.output_width": 8,
    "model.num_bins": 4,
    "model.numeric_width": 2,
    "model.cross_rank": 4,
    "model.hidden": 16,
    "training.batch_contexts": 32,
    "training.checkpoint_every_steps": 1,
}
TRAIN = [
    *("train", "--run", RUN, "--cpu", "--threads", "1"),
    *(f"--set={name}={value}" for name, value in _SETTINGS.items()),
]
"""The command that trains a small model, with a checkpoint after every step."""


def write_data(folder: Path, *, num_users: int = 60, num_events: int = 5500) -> Path:
    """Parquet files and their TOML; a user buys or views anything in words, at any second."""
    random = np.random.default_rng(4)
    folder.mkdir(parents=True)

    def moments(num: int) -> pa.Array:
        seconds = START + np.sort(random.choice(90 * DAY, size=num, replace=False))
        return pa.array(seconds * 1_000_000, TIME)

    words = random.integers(0, WORDS, size=(num_events, 2))
    items = random.integers(0, 40, size=num_events)
    pq.write_table(
        pa.table(
            {
                "user_id": [f"u{n}" for n in random.integers(0, num_users, size=num_events)],
                "event_timestamp": moments(num_events),
                "scene": np.where(random.random(num_events) < 0.5, "buy", "view").tolist(),
                "text": [f"word{a} word{b}" for a, b in words],
                "item_id": [f"i{n}" for n in items],
            }
        ),
        folder / "events.parquet",
    )
    pq.write_table(
        pa.table(
            {
                "item_id": [f"i{n}" for n in range(40)],
                "text": [f"word{n} word{n + 40}" for n in range(40)],
                "price": [1.5 * n for n in range(40)],
                "shelf": [f"shelf {n % 5}" for n in range(40)],
            }
        ),
        folder / "items.parquet",
    )
    requests = np.repeat(np.arange(400), 3)
    pq.write_table(
        pa.table(
            {
                "request_id": [f"r{n}" for n in requests],
                "user_id": [f"u{n}" for n in random.integers(0, num_users, size=400)[requests]],
                "item_id": [f"i{n}" for n in (requests * 7 + np.arange(1200)) % 40],
                "event_timestamp": moments(400).take(pa.array(requests)),
                "clicked": (random.random(1200) < 0.3).astype(np.int8),
            }
        ),
        folder / "impressions.parquet",
    )
    (folder / "data.toml").write_text(TOML, encoding="utf-8")
    return folder / "data.toml"


@dataclass(frozen=True)
class Servers:
    """Servers that may be killed: what they said to be written stays, whatever ends them."""

    postgres: PostgresServer
    redis: RedisServer

    def database(self, template: str = "template1") -> str:
        """Name of a new database, a copy of another."""
        name = f"faults_{uuid.uuid4().hex}"
        with psycopg.connect(self.postgres.url, autocommit=True) as session:
            create = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
            session.execute(create.format(sql.Identifier(name), sql.Identifier(template)))
        return name

    def drop(self, name: str) -> None:
        """Remove a database, whoever uses it."""
        with psycopg.connect(self.postgres.url, autocommit=True) as session:
            drop = sql.SQL("DROP DATABASE {} WITH (FORCE)")
            session.execute(drop.format(sql.Identifier(name)))

    def url(self, database: str) -> str:
        """DATABASE_URL of a database."""
        return self.postgres.url.replace(f"/{DATABASE}?", f"/{database}?")

    def hashes(self) -> dict[bytes, dict[bytes, bytes]]:
        """All hashes in Redis."""
        with redis.Redis(port=self.redis.port) as client:
            keys = sorted(client.scan_iter(count=2000, _type="HASH"))
            pipe = client.pipeline(transaction=False)
            for key in keys:
                pipe.hgetall(key)
            return dict(zip(keys, pipe.execute(), strict=True))

    def restore(self, hashes: dict[bytes, dict[bytes, bytes]]) -> None:
        """Put back what :meth:`hashes` gave, in place of everything."""
        with redis.Redis(port=self.redis.port) as client:
            client.flushall()
            pipe = client.pipeline(transaction=False)
            for key, values in hashes.items():
                pipe.hset(key, mapping=values)
            pipe.execute()


@dataclass(frozen=True)
class Stage:
    """A home and its stores, to run commands on."""

    home: Home
    servers: Servers
    database: str
    said: Path
    """Folder of what its commands say."""

    @property
    def variables(self) -> dict[str, str]:
        """Environment of a command or of a test that reads the stores."""
        return {
            "PATH": "/usr/bin:/bin",
            "PGCONNECT_TIMEOUT": "10",
            "HF_HUB_OFFLINE": "1",
            "DATABASE_URL": self.servers.url(self.database),
            "REDIS_URL": self.servers.redis.url,
        }

    def start(
        self,
        arguments: list[str],
        *,
        stop: Stop | None = None,
        counted: Collection[Event] = (),
        file_size: int | None = None,
        **variables: str,
    ) -> Command:
        """Begin a command of the profile production; ``variables`` replace those of the stage."""
        return Command(
            ["--home", str(self.home.root), "--profile", "production", *arguments],
            self.variables | variables,
            self.home.root,
            self.said,
            stop=stop,
            counted=counted,
            file_size=file_size,
        )

    def run(self, arguments: list[str], *, file_size: int | None = None, **variables: str) -> Done:
        """Run a command to its end; see :meth:`start`."""
        return self.start(arguments, file_size=file_size, **variables).end()

    def contents(self) -> dict[str, Any]:
        """Everything that the stores hold: what a user could read of them, row by row."""
        assert not list(self.home.root.rglob("*.part")), "the rest of a step was left behind"
        found: dict[str, Any] = {
            f"file {path.relative_to(self.home.root)}": _rows(pq.read_table(path))
            for path in self.home.root.rglob("*.parquet")
        }
        with psycopg.connect(self.servers.url(self.database)) as session:
            tables = session.execute(
                "SELECT tablename FROM pg_tables WHERE tablename LIKE 'canonical%' "
                "OR tablename LIKE 'behavior_embeddings%' OR tablename IN ('user_sequences', "
                "'user_stats', 'items', 'item_neighbors', 'longtrail_parts')"
            ).fetchall()
            for (table,) in tables:
                # Which state of a file is loaded is told by its change time.
                columns = "*" if table != "longtrail_parts" else "table_name, part, num_rows"
                copy_out = f"COPY (SELECT {columns} FROM {table}) TO STDOUT"
                with session.cursor().copy(copy_out.encode()) as copy:
                    found[f"table {table}"] = sorted(bytes(row) for row in copy)
        for key, values in self.servers.hashes().items():
            if not key.startswith(b"longtrail:"):  # which run wrote them
                found[f"hash {key!r}"] = values
        run = self.home.runs / RUN
        if run.exists():
            manifest = json.loads((run / "manifest.json").read_text("utf-8"))
            found["metrics"] = manifest["metrics"]
            found["weights"] = (run / "weights.safetensors").read_bytes()
        return found


def _rows(table: pa.Table) -> pa.Table:
    """Rows in an order that depends on nothing but themselves."""
    scalars = [f.name for f in table.schema if not pa.types.is_nested(f.type)]
    return table.sort_by([(name, "ascending") for name in scalars]).replace_schema_metadata()


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names of what is not equal."""
    return [
        name
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) is None or found[name] != expected.get(name)
    ]


@dataclass(frozen=True)
class Snapshot:
    """The stores after a step that nothing disturbed."""

    home: Path
    database: str
    hashes: dict[bytes, dict[bytes, bytes]]
    contents: dict[str, Any]
    events: dict[Event, int]
    """Of the step's command."""


@dataclass
class World:
    """The steps in order, and the stores after each."""

    root: Path
    servers: Servers
    steps: dict[str, list[str]]
    snapshots: dict[str, Snapshot] = field(default_factory=dict)

    def build(self) -> None:
        """Run every step once."""
        database = self.servers.database()
        stage = Stage(Home(self.root / "built"), self.servers, database, self.root / "said")
        self._keep("nothing", stage, {})
        for name, arguments in self.steps.items():
            done = stage.start(arguments, counted=COUNTED[name]).end()
            assert done.code == 0, done.stderr
            self._keep(name, stage, done.events)

    def _keep(self, name: str, stage: Stage, events: dict[Event, int]) -> None:
        home = self.root / "snapshots" / name
        stage.home.root.mkdir(exist_ok=True)
        shutil.copytree(stage.home.root, home)
        database = self.servers.database(stage.database)
        hashes = self.servers.hashes()
        self.snapshots[name] = Snapshot(home, database, hashes, stage.contents(), events)

    def expected(self, step: str) -> dict[str, Any]:
        """What the stores hold after a step."""
        return self.snapshots[step].contents

    def before(self, step: str) -> str:
        """The step before another."""
        names = ["nothing", *self.steps]
        return names[names.index(step) - 1]

    @contextmanager
    def stage(
        self, after: str, *, tables_after: str | None = None, disk: Path | None = None
    ) -> Iterator[Stage]:
        """A copy of the stores as they were after a step, removed at the end.

        Args:
            after: The step.
            tables_after: PostgreSQL is as it was after this one.
            disk: Where the home is.
        """
        snapshot = self.snapshots[after]
        name = uuid.uuid4().hex
        root = (disk or self.root / "stages") / name
        shutil.copytree(snapshot.home, root)
        database = self.servers.database(self.snapshots[tables_after or after].database)
        self.servers.restore(snapshot.hashes)
        try:
            yield Stage(Home(root), self.servers, database, self.root / "said" / name)
        finally:
            self.servers.drop(database)
            shutil.rmtree(root)


def steps(toml: Path, model: Path) -> dict[str, list[str]]:
    """The commands from raw logs to online features and a model."""
    return {
        "ingest": ["ingest", str(toml)],
        "encode": ["encode", "--model", str(model), "--split-layer", "3", "--max-tokens", "16"],
        "sequences": ["sequences", "--threads", "1"],
        "apply": ["apply"],
        "materialize": ["materialize"],
        "train": TRAIN,
    }


def kill(server: PostgresServer | RedisServer) -> None:
    """End a server with SIGKILL."""
    process = server.process()
    assert process is not None
    stop_process(process, signal.SIGKILL, timeout_s=30)


def stops(name: str, events: dict[Event, int], kinds: list[Event], num: int) -> list[Stop]:
    """Random events of a command, of the kinds by turns; the same for the same name."""
    random = np.random.default_rng([4, *name.encode()])
    turns = (kinds * num)[:num]
    return [Stop(kind, 1 + int(random.random() * 0.98 * events[kind])) for kind in turns]
