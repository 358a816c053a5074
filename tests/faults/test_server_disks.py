"""Full disks under the servers: one sentence, nothing corrupt, done when there is room again."""

import dataclasses
import signal
import time
from collections.abc import Iterator

import pytest
import redis

from feature_repo.services.postgres import DATABASE, PostgresServer
from feature_repo.services.processes import free_port, stop_process
from feature_repo.services.redis import RedisServer
from tests.faults.conftest import end
from tests.faults.small_disk import SmallDisk, small_disk
from tests.faults.world import Servers, World, differences
from tests.servers import PASSWORD

pytestmark = pytest.mark.timeout(900)  # with the world's own setup, on a busy machine

MIB = 2**20


@pytest.fixture
def postgres_disk() -> Iterator[SmallDisk]:
    """Room for a new cluster of databases, 40 MB, and its log."""
    with small_disk(160 * MIB) as disk:
        yield disk


@pytest.fixture
def redis_disk() -> Iterator[SmallDisk]:
    with small_disk(16 * MIB) as disk:
        yield disk


@pytest.mark.parametrize("room", [0, 3 * MIB], ids=["from the start", "in the middle of a load"])
def test_postgresql_on_a_full_disk(world: World, postgres_disk: SmallDisk, room: int) -> None:
    settings = ("fsync=off", "full_page_writes=off", "min_wal_size=32MB", "max_wal_size=32MB")
    server = PostgresServer(
        postgres_disk.folder / "postgres", free_port(), PASSWORD, settings=settings
    )
    server.start()
    try:
        with world.stage("sequences", tables_after="nothing") as copied:
            servers = Servers(server, world.servers.redis)
            stage = dataclasses.replace(copied, servers=servers, database=DATABASE)
            with postgres_disk.full(server, room):
                sentence = stage.run(world.steps["sequences"]).sentence
                assert f"127.0.0.1:{server.port}" in sentence
                assert "nothing is lost" in sentence
                if postgres_disk.mounted and room:
                    assert "its disk is full" in sentence
            server.start()  # where it could not even write its own log it stopped
            assert stage.run(world.steps["sequences"]).code == 0
            assert differences(stage.contents(), world.expected("sequences")) == []
    finally:
        end(server)


@pytest.mark.parametrize("then", ["room again", "killed"])
def test_redis_on_a_full_disk(world: World, redis_disk: SmallDisk, then: str) -> None:
    server = RedisServer(redis_disk.folder / "redis", free_port(), "")
    server.start()
    try:
        with world.stage("apply") as copied:
            servers = Servers(world.servers.postgres, server)
            stage = dataclasses.replace(copied, servers=servers)
            with redis_disk.full(server):
                notice_full_disk(server)
                sentence = stage.run(world.steps["materialize"]).sentence
                assert f"Redis at 127.0.0.1:{server.port}" in sentence
                if redis_disk.mounted:
                    assert "cannot write to its disk" in sentence
            process = server.process()
            if then == "killed" and process is not None:
                stop_process(process, signal.SIGKILL, timeout_s=30)
            server.start()
            wait_until_writable(server)
            assert stage.run(world.steps["materialize"]).code == 0
            assert differences(stage.contents(), world.expected("materialize")) == []
    finally:
        end(server)


def notice_full_disk(server: RedisServer) -> None:
    """Write until Redis says that it cannot, or is gone: it notices a second after the write."""
    deadline = time.monotonic() + 60
    with redis.Redis(port=server.port) as client:
        while time.monotonic() < deadline:
            try:
                client.set("filling", bytes(100_000))
            except (redis.ResponseError, redis.ConnectionError):
                return
            time.sleep(0.05)
    raise AssertionError("Redis never noticed that its disk is full")


def wait_until_writable(server: RedisServer) -> None:
    """It tries its disk again every second."""
    deadline = time.monotonic() + 60
    with redis.Redis(port=server.port) as client:
        while True:
            try:
                client.delete("filling")
            except redis.ResponseError:
                time.sleep(0.05)
            else:
                return
            assert time.monotonic() < deadline, "Redis does not go on"
