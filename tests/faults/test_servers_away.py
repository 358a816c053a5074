"""Servers that are away, hang or restart while something reads from them."""

import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis

from feature_repo.errors import StoreError
from feature_repo.offline import open_offline
from feature_repo.postgres_session import Database
from feature_repo.profiles import open_store
from feature_repo.reader import FeatureReader
from tests.faults.commands import Done, Stop
from tests.faults.world import Stage, World, differences, kill
from tests.feature_repo.test_reader import assert_equal

pytestmark = pytest.mark.timeout(900)  # with the world's own setup, on a busy machine

USERS = ["u1", "u2", "nobody", "u59"]
LIMIT_S = 0.5
COMMANDS = (["doctor"], ["status"], ["parity"], ["materialize"], ["rank", "u1"])
PASSWORD_LIMIT_S = 2.0
CALLS_FROM_LAST_ROW = 100
"""Calls of a copy behind its last row, of which there are more."""


def fastest_failure(look_up: Callable[[], object]) -> float:
    """Seconds of the fastest of some failures: a busy machine may stop us in one of them."""
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        with pytest.raises(StoreError, match="does not answer as it should"):
            look_up()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def use(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in stage.variables.items():
        if name.endswith("_URL"):
            monkeypatch.setenv(name, value)


def test_lookups_without_redis_fail_at_once_and_recover(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = world.servers.redis
    with world.stage("materialize") as stage:
        use(stage, monkeypatch)
        reader = FeatureReader(stage.home, "production")
        expected = reader.online_users(USERS)
        assert expected.found.tolist() == [True, True, False, True]
        kill(server)
        try:
            assert fastest_failure(lambda: reader.online_users(USERS)) < LIMIT_S
        finally:
            server.start()
        assert_equal(reader.online_users(USERS), expected)

        process = server.process()
        assert process is not None
        process.suspend()
        try:
            assert fastest_failure(lambda: reader.online_users(USERS)) < LIMIT_S
        finally:
            process.resume()
        assert_equal(reader.online_users(USERS), expected)


@pytest.mark.parametrize("server", ["redis", "postgres"])
def test_a_wrong_password_is_said_at_once(world: World, server: str) -> None:
    """Feast's own client of Redis tries for ten seconds."""
    with world.stage("train") as stage, redis.Redis(port=world.servers.redis.port) as client:
        right = {
            "REDIS_URL": f"redis://:right@127.0.0.1:{world.servers.redis.port}/0",
            "DATABASE_URL": stage.variables["DATABASE_URL"],
        }
        if server == "redis":
            wrong = right | {"REDIS_URL": right["REDIS_URL"].replace("right", "wrong")}
            said = "refuses the login"
        else:
            address = urlsplit(right["DATABASE_URL"])
            address = address._replace(netloc=f"longtrail:wrong@127.0.0.1:{address.port}")
            wrong = right | {"DATABASE_URL": address.geturl()}
            said = "password authentication failed"
        client.config_set("requirepass", "right")
        try:
            for command in COMMANDS:
                began = time.perf_counter()
                assert stage.run(command, **right).code == 0
                # To load a model takes a while, too, and so does everything on a busy machine.
                limit_s = max(PASSWORD_LIMIT_S, 2 * (time.perf_counter() - began))
                for attempt in range(3):
                    began = time.perf_counter()
                    done = stage.run(command, **wrong)
                    seconds = time.perf_counter() - began
                    assert done.code == 1
                    assert said in done.stderr + done.stdout
                    assert "Traceback" not in done.stderr
                    if seconds < limit_s:
                        break
                    assert attempt < 2, f"{command} took {seconds} s"
        finally:
            client.config_set("requirepass", "")


def test_postgresql_restarts_in_the_middle_of_a_read(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = world.servers.postgres
    with world.stage("apply") as stage:
        use(stage, monkeypatch)
        reader = FeatureReader(stage.home, "production")
        end = reader.manifest.now()
        start = end - timedelta(days=400)

        def rows() -> tuple[int, list[pa.RecordBatch]]:
            num_keys, batches = reader.views.offline.newest_rows(
                "user_sequences", start=start, end=end, batch_rows=10
            )
            return num_keys, list(batches)

        num_keys, expected = rows()
        assert len(expected) > 3
        with reader.views.offline.held():  # the session that is held is lost
            _, batches = reader.views.offline.newest_rows(
                "user_sequences", start=start, end=end, batch_rows=10
            )
            read = [next(batches)]
            with restart(stage):
                read += batches
        assert pa.Table.from_batches(read).equals(pa.Table.from_batches(expected))
        assert sum(batch.num_rows for batch in read) == num_keys

        impressions = pq.read_table(stage.home.impressions)
        users = impressions["user_id"].to_numpy()
        times = impressions["event_timestamp"].cast(pa.int64()).to_numpy().astype(np.int64)
        found = reader.historical_users(users, times)
        assert found.found.any()
        with restart(stage):
            assert_equal(reader.historical_users(users, times), found)

        store = open_store(stage.home, "production")
        names = {view.name for view in store.list_feature_views()}
        with restart(stage):
            assert {view.name for view in store.list_feature_views()} == names

        database = Database(store.config.offline_store, patience_s=0.2)
        kill(server)
        try:
            with pytest.raises(StoreError, match="check the server and DATABASE_URL"):
                database.read(lambda session: session.execute("SELECT 1").fetchone())
        finally:
            server.start()
        assert open_offline(store).parts("items")
        assert database.read(lambda session: session.execute("SELECT 1").fetchone()) == (1,)


def test_postgresql_is_away_when_the_end_of_a_copy_is_registered(world: World) -> None:
    """All rows are online by then; Feast's registry is written last."""
    server, name = world.servers.postgres, "materialize"
    whole = world.snapshots[name]
    with world.stage("apply") as stage:
        stop = Stop("call", whole.events["call"] - CALLS_FROM_LAST_ROW)
        command = stage.start(world.steps[name], stop=stop)
        command.wait_for_stop()
        kill(server)
        try:
            command.go_on()
            said = command.end().sentence
        finally:
            server.start()
        assert said.startswith("Error: PostgreSQL does not answer as it should (connection to")
        assert world.servers.hashes().keys() == whole.hashes.keys()
        assert stage.run(world.steps[name]).code == 0
        assert differences(stage.contents(), world.expected(name)) == []


@pytest.mark.parametrize("command", ["apply", "doctor"])
def test_postgresql_is_away_before_a_command(world: World, command: str) -> None:
    server, step = world.servers.postgres, {"apply": "apply", "doctor": "materialize"}[command]
    with world.stage("sequences" if command == "apply" else step) as stage:
        before = stage.run([command]) if command == "doctor" else None
        kill(server)
        try:
            done = stage.run([command])
        finally:
            server.start()
        said = done.sentence if before is None else checks(done)["registry"]["detail"]
        assert done.code == 1
        assert "the registry of the profile 'production' at 127.0.0.1" in said
        assert "cannot be reached (connection to server at" in said
        assert "Traceback" not in done.stderr
        again = stage.run([command])
        assert again.code == 0 if before is None else which_hold(again) == which_hold(before)
        assert differences(stage.contents(), world.expected(step)) == []


def checks(done: Done) -> dict[str, dict[str, Any]]:
    """Name -> a check of `doctor`."""
    return {check["name"]: check for check in json.loads(done.stdout)["checks"]}


def which_hold(done: Done) -> dict[str, bool]:
    """Name -> whether it holds, which may depend on the machine's disk."""
    return {name: check["ok"] for name, check in checks(done).items()}


class restart:  # noqa: N801
    """PostgreSQL is killed, and comes back while the block runs."""

    def __init__(self, stage: Stage) -> None:
        self._server = stage.servers.postgres
        self._back = threading.Thread(target=self._server.start)

    def __enter__(self) -> None:
        kill(self._server)
        self._back.start()

    def __exit__(self, *_: object) -> None:
        self._back.join()
