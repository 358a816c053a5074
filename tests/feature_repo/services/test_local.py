"""Local servers: on demand, one per home, no leftover process, nobody else's touched."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from feature_repo.errors import StoreError
from feature_repo.home import PROJECT_ROOT, Home
from feature_repo.services import local
from feature_repo.services.binaries import SYSTEM_FOLDER
from feature_repo.services.postgres import PostgresServer
from feature_repo.services.processes import as_root
from tests.servers import scratch_folder

COMMAND = """
import sys, time
from pathlib import Path
from feature_repo.home import Home
from feature_repo.services import local
local.hold(Home(Path(sys.argv[1])))
print("ready", flush=True)
if sys.argv[2] == "fail":
    raise RuntimeError("as asked")
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def made() -> Iterator[Home]:
    """A home whose servers have run before: initdb takes a second."""
    folder = scratch_folder()
    home = Home(folder / "a home")  # with a space, as on some machines
    local.start(home)
    local.stop(home)
    yield home
    shutil.rmtree(folder)


@pytest.fixture
def home(made: Home) -> Iterator[Home]:
    """The home, where nothing runs before and after the test."""
    assert not running(made)
    yield made
    local.release(made)
    local.stop(made)
    assert not running(made)


def running(home: Home) -> list[psutil.Process]:
    """Every process that works on the home's servers' data."""
    found = []
    for process in psutil.process_iter():
        try:
            words = " ".join([*process.cmdline(), process.cwd()])
        except psutil.AccessDenied:
            words = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if str(home.root / "services") in words:
            found.append(process)
    return found


def command(home: Home, how: str = "wait") -> subprocess.Popen[str]:
    """A command that uses the servers, from when it is returned until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(home.root), how],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=PROJECT_ROOT, env={**os.environ, "PYTHONPATH": str(PROJECT_ROOT)},
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_start_and_stop_are_idempotent_and_keep_ports_and_data(home: Home) -> None:
    first = local.start(home)
    assert first.postgres.running
    assert first.redis.running
    assert first.keep
    assert not first.in_use
    assert local.start(home) == first
    assert local.status(home) == first
    urls = local.addresses(home)
    with psycopg.connect(urls["postgres"]) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS value")
        zone, sync = connection.execute(
            "SELECT current_setting('timezone'), current_setting('fsync')"
        ).fetchone() or (None, None)
    assert (zone, sync) == ("UTC", "on")
    with redis.Redis.from_url(urls["redis"]) as client:
        client.set("kept", 7)
        assert client.config_get("append*")["appendonly"] == "yes"
        assert client.config_get("append*")["appendfsync"] == "everysec"
    stopped = local.stop(home)
    assert not stopped.postgres.running
    assert not stopped.redis.running
    assert not running(home)
    assert local.stop(home) == stopped
    again = local.start(home)
    assert (again.postgres.port, again.redis.port) == (first.postgres.port, first.redis.port)
    assert local.addresses(home) == urls
    with psycopg.connect(urls["postgres"]) as connection:
        assert connection.execute("SELECT value FROM kept").fetchone() == (7,)
    with redis.Redis.from_url(urls["redis"]) as client:
        assert client.get("kept") == b"7"


def test_passwords_are_wanted_and_only_in_files_of_mode_600(home: Home) -> None:
    local.start(home)
    urls = local.addresses(home)
    shown = json.dumps(str(local.status(home)))
    for kind, url in urls.items():
        secret = json.loads((home.root / "services" / "services.json").read_text())["servers"][
            kind
        ]["password"]
        assert secret in url
        assert secret not in shown
        for path in home.root.rglob("*"):
            if path.is_file() and secret.encode() in path.read_bytes():
                assert path.stat().st_mode & 0o777 == 0o600, path
        with pytest.raises((psycopg.OperationalError, redis.AuthenticationError)):
            connect(url.replace(secret, "wrong"))


def connect(url: str) -> None:
    if url.startswith("redis"):
        with redis.Redis.from_url(url) as client:
            client.ping()
    else:
        psycopg.connect(url).close()


def test_a_command_stops_what_it_started_however_it_ends(home: Home) -> None:
    for how, ends in (("wait", end), ("fail", None), ("wait", signal.SIGTERM)):
        process = command(home, how)
        if ends is end:
            assert len(running(home)) >= 2
            assert local.status(home).in_use
            end(process)
        else:
            if ends is signal.SIGTERM:
                process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
            assert process.returncode == (143 if ends else 1)
        assert not running(home), how


def test_the_last_of_two_commands_stops_the_servers(home: Home) -> None:
    first, second = command(home), command(home)
    pids = local.status(home).postgres.pid, local.status(home).redis.pid
    end(first)
    after = local.status(home)
    assert (after.postgres.pid, after.redis.pid) == pids
    end(second)
    assert not running(home)


def test_servers_of_a_killed_command_are_stopped(home: Home) -> None:
    process = command(home)
    (watch,) = psutil.Process(process.pid).children()
    assert len(running(home)) >= 2
    process.kill()
    process.communicate()
    psutil.wait_procs([watch], timeout=60)
    assert not running(home)
    # Where another command uses them, that one's end does it.
    first, second = command(home), command(home)
    pids = local.status(home).postgres.pid, local.status(home).redis.pid
    (watch,) = psutil.Process(first.pid).children()
    first.kill()
    first.communicate()
    psutil.wait_procs([watch], timeout=60)
    left = local.status(home)
    assert (left.postgres.pid, left.redis.pid) == pids
    assert left.in_use
    end(second)
    assert not running(home)


def test_no_process_stays_behind_a_command(home: Home) -> None:
    process = command(home)
    (watch,) = psutil.Process(process.pid).children()
    end(process)
    assert not watch.is_running()


def test_servers_left_by_a_kill_of_everything_are_adopted_then_stopped(home: Home) -> None:
    process = killed_with_its_watch(home)
    pids = local.status(home).postgres.pid, local.status(home).redis.pid
    assert None not in pids
    assert not local.status(home).in_use
    assert process.returncode == -signal.SIGKILL
    other = command(home)
    adopted = local.status(home)
    assert (adopted.postgres.pid, adopted.redis.pid) == pids
    end(other)
    assert not running(home)
    killed_with_its_watch(home)
    local.stop(home)
    assert not running(home)


def killed_with_its_watch(home: Home) -> subprocess.Popen[str]:
    """A command that was killed, and before it the process that would stop the servers."""
    process = command(home)
    (watch,) = psutil.Process(process.pid).children()
    watch.kill()
    process.kill()
    process.communicate()
    return process


def test_stop_leaves_the_servers_to_a_command_that_uses_them(home: Home) -> None:
    local.start(home)
    process = command(home)
    left = local.stop(home)
    assert left.postgres.running
    assert left.in_use
    assert not left.keep
    end(process)
    assert not running(home)


def test_started_servers_stay_when_a_command_ends(home: Home) -> None:
    status = local.start(home)
    end(command(home))
    assert local.status(home) == status


def test_killed_servers_start_again_with_everything_written(home: Home) -> None:
    urls = local.hold(home)
    with psycopg.connect(urls["postgres"]) as connection:
        connection.execute("CREATE TABLE survivor AS SELECT 1")
    with redis.Redis.from_url(urls["redis"]) as client:
        client.set("survivor", 1)
    before = local.status(home)
    for pid in (before.postgres.pid, before.redis.pid):
        os.kill(pid or 0, signal.SIGKILL)
    while local.status(home).postgres.running or local.status(home).redis.running:
        time.sleep(0.01)
    assert (home.root / "services" / "postgres" / "data" / "postmaster.pid").exists()
    with pytest.raises(StoreError, match="run `longtrail services start` first"):
        local.addresses(home)
    assert local.hold(home) == urls
    with psycopg.connect(urls["postgres"]) as connection:
        assert connection.execute("SELECT count(*) FROM survivor").fetchone() == (1,)
    with redis.Redis.from_url(urls["redis"]) as client:
        assert client.get("survivor") == b"1"


def test_foreign_processes_and_ports_are_left_alone(home: Home) -> None:
    """Pids are given again: a pid file of a past life may name any program."""
    local.start(home)
    ports = local.stop(home), json.loads((home.root / "services" / "services.json").read_text())
    taken = {kind: server["port"] for kind, server in ports[1]["servers"].items()}
    with (
        subprocess.Popen(["sleep", "600"], start_new_session=True) as foreign,
        socket.create_server(("127.0.0.1", taken["postgres"])),
        socket.create_server(("127.0.0.1", taken["redis"])),
    ):
        pid_files = (
            home.root / "services" / "postgres" / "data" / "postmaster.pid",
            home.root / "services" / "redis" / "redis.pid",
        )
        for file in pid_files:
            file.write_text(f"{foreign.pid}\n")
        try:
            assert not local.status(home).postgres.running
            assert not local.status(home).redis.running
            local.stop(home)
            status = local.start(home)
            assert status.postgres.port not in (None, taken["postgres"])
            assert status.redis.port not in (None, taken["redis"])
            connect(local.addresses(home)["postgres"])
            local.stop(home)
            assert foreign.poll() is None
        finally:
            foreign.kill()


def test_a_server_that_cannot_start_says_why_and_nothing_runs_on(home: Home) -> None:
    configuration = home.root / "services" / "postgres" / "data" / "postgresql.conf"
    text = configuration.read_text()
    configuration.write_text(text + "nonsense = 1\n")
    try:
        for attempt in (local.start, local.hold):
            with pytest.raises(StoreError, match=r"PostgreSQL did not start on .*configuration"):
                attempt(home)
            assert not running(home)
            assert not local.status(home).keep
    finally:
        configuration.write_text(text)


def test_data_go_where_the_servers_account_can_reach_them(home: Home) -> None:
    closed = Home(home.root.parent / "closed" / "home")
    closed.root.mkdir(parents=True)
    closed.root.parent.chmod(0o700)
    status = local.status(closed)
    inside = closed.root / "services"
    assert status.redis.folder == str(inside / "redis")
    if not as_root():
        assert status.postgres.folder == str(inside / "postgres")
        return
    data = Path(status.postgres.folder)
    assert data.parent == SYSTEM_FOLDER
    try:
        # A home that was removed left data there, whose password is lost: this one begins anew.
        data.mkdir(parents=True)
        (data / "leftover").touch()
        connect(local.hold(closed, ["postgres"])["postgres"])
        assert not (data / "leftover").exists()
        assert data.stat().st_mode & 0o777 == 0o700
    finally:
        local.release(closed)
        assert PostgresServer(data, 0, "").process() is None
        shutil.rmtree(data)


def test_data_whose_password_is_lost_are_not_removed(home: Home) -> None:
    record = home.root / "services" / "services.json"
    text = record.read_text()
    record.unlink()
    try:
        with pytest.raises(StoreError, match=r"password of the data in .* is lost"):
            local.start(home)
        assert (home.root / "services" / "postgres" / "data" / "PG_VERSION").exists()
    finally:
        record.write_text(text)
