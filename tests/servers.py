"""Real servers for the tests: one PostgreSQL, one Redis and one Redis Cluster for a whole run.

They start with the first test that asks for them. ``database_url`` and ``redis_url`` are empty for
every test.
"""

import shutil
import signal
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis

from feature_repo.services.postgres import DATABASE, PostgresServer
from feature_repo.services.processes import free_port
from feature_repo.services.redis import RedisServer
from tests.waiting import wait_until

PASSWORD = "a,b'c=\\$d"  # noqa: S105  # characters that break URLs, YAML and connection strings
NUM_SLOTS = 16384
FAST = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")


@dataclass(frozen=True)
class RedisCluster:
    """Three nodes, each with a third of the slots, no replicas."""

    nodes: tuple[RedisServer, ...]

    @property
    def url(self) -> str:
        """REDIS_URL of a cluster: all hosts, separated by commas."""
        return "redis://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    @property
    def connection_string(self) -> str:
        """The address as Feast spells it; ``redis_type`` is ``redis_cluster``."""
        return ",".join(node.connection_string for node in self.nodes)

    def start(self) -> None:
        """Start the nodes and wait until they agree that every slot is served."""
        for node in self.nodes:
            node.start()
        clients = [redis.Redis(port=node.port) for node in self.nodes]
        for place, client in enumerate(clients):
            if not int(cluster_info(client)["cluster_slots_assigned"]):
                first = place * NUM_SLOTS // len(clients)
                end = (place + 1) * NUM_SLOTS // len(clients)
                command(client, "CLUSTER", "ADDSLOTS", *range(first, end))
                # Only a node that knows no other one takes it: all of them before the first MEET.
                command(client, "CLUSTER", "SET-CONFIG-EPOCH", place + 1)
        for client in clients:
            for node in self.nodes:
                command(client, "CLUSTER", "MEET", "127.0.0.1", node.port)
        wait_until(
            lambda: all(self._agrees(client) for client in clients),
            "the cluster's nodes find each other",
            most_s=30,
            poll_s=0.05,
        )
        for client in clients:
            client.close()

    def stop(self) -> None:
        """Stop the nodes."""
        for node in self.nodes:
            node.stop()

    def flush(self) -> None:
        """Delete every key."""
        for node in self.nodes:
            with redis.Redis(port=node.port) as client:
                client.flushall()

    def _agrees(self, client: redis.Redis) -> bool:
        info = cluster_info(client)
        known = int(info["cluster_known_nodes"])
        return info["cluster_state"] == "ok" and known == len(self.nodes)


def cluster_info(client: redis.Redis) -> dict[str, str]:
    info: dict[str, str] = command(client, "CLUSTER INFO")
    return info


def command(client: redis.Redis, *words: str | int) -> Any:
    """What a server says to a command; the library leaves it untyped."""
    return client.execute_command(*words)  # type: ignore[no-untyped-call]


def scratch_folder() -> Path:
    """A new folder that the servers' account can reach, as pytest's own cannot for root."""
    folder = Path(tempfile.mkdtemp(prefix="longtrail-test-")).resolve()
    folder.chmod(0o711)
    return folder


@pytest.fixture
def scratch() -> Iterator[Path]:
    """:func:`scratch_folder`, removed after the test."""
    folder = scratch_folder()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def _ends_in_order() -> Iterator[None]:
    """Let SIGTERM (of a `timeout`, say) end the run as Ctrl-C does: no server is left behind."""
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("SIGTERM", returncode=143))
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def postgres(_ends_in_order: None) -> Iterator[PostgresServer]:
    """A running PostgreSQL for the whole run, with a password that wants quoting."""
    folder = scratch_folder()
    server = PostgresServer(folder / "postgres", free_port(), PASSWORD, settings=FAST)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(folder)


@contextmanager
def running_redis() -> Iterator[RedisServer]:
    """A Redis of one's own, which may be stopped and started."""
    folder = scratch_folder()
    server = RedisServer(folder / "redis", free_port(), "")
    server.start()
    yield server
    server.stop()
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def redis_server(_ends_in_order: None) -> Iterator[RedisServer]:
    """A running Redis for the whole run."""
    with running_redis() as server:
        yield server


@pytest.fixture(scope="session")
def redis_cluster(_ends_in_order: None) -> Iterator[RedisCluster]:
    """A running cluster of three for the whole run."""
    folder = scratch_folder()
    settings = ("cluster-enabled yes", "cluster-node-timeout 2000")
    ports = [free_port(above=10_000) for _ in range(3)]  # the nodes' own line is 10,000 above
    cluster = RedisCluster(
        tuple(RedisServer(folder / str(p), p, "", settings=settings) for p in ports)
    )
    cluster.start()
    yield cluster
    cluster.stop()
    shutil.rmtree(folder)


@pytest.fixture
def database_url(postgres: PostgresServer) -> Iterator[str]:
    """A new, empty database in :func:`postgres`, dropped after the test."""
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    yield postgres.url.replace(f"/{DATABASE}?", f"/{name}?")
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """:func:`redis_server`, emptied."""
    with redis.Redis(port=redis_server.port) as client:
        client.flushall()
    return redis_server.url
