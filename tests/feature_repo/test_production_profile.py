"""The profile production with real servers: plain feast in a process, and our commands."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner, Result
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import (
    PostgreSQLSource,
)

from feature_repo.connections import DATABASE_URL, REDIS_URL
from feature_repo.definitions import define
from feature_repo.home import HOME_VARIABLE, PROJECT_ROOT, Home
from feature_repo.profiles import REPO_FOLDER, open_store, profile_file, store_variables
from feature_repo.services import local
from longtrail import main
from tests.forked import feast as plain_feast
from tests.forked import run_forked

FEAST = Path(sys.executable).parent / "feast"
OURS = ("LONGTRAIL_", "PGCONNECT_TIMEOUT", DATABASE_URL, REDIS_URL)


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Tests start without addresses, and those that the code sets end with the test."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(OURS):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def home(
    tmp_path: Path, database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> Home:
    """An empty home, and addresses of an empty database and Redis in the environment."""
    monkeypatch.setenv(DATABASE_URL, database_url)
    monkeypatch.setenv(REDIS_URL, redis_url)
    return Home(tmp_path / "home")


def feast(yaml: Path, variables: dict[str, str], *arguments: str) -> str:
    """What the feast command says, in a process with everything imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(OURS)}
    environment |= variables | {"FEAST_USAGE": "False"}
    done = run_forked(
        plain_feast,
        ["-f", str(yaml), *arguments],
        output=yaml.with_name("said"),
        folder=REPO_FOLDER,
        variables=environment,
    )
    assert done.code == 0, done.said
    return done.said


def run(home: Home, *arguments: str) -> Result:
    return CliRunner().invoke(
        main, ["--home", str(home.root), "--profile", "production", *arguments]
    )


def test_both_profiles_define_the_same_but_their_sources(tmp_path: Path) -> None:
    files, tables = define(Home(tmp_path)), define(Home(tmp_path), "postgres")
    assert files.entities == tables.entities
    for of_files, of_tables in zip(files.services, tables.services, strict=True):
        assert of_files.name == of_tables.name
        read, also_read = of_files.feature_view_projections, of_tables.feature_view_projections
        assert [(p.name, p.features) for p in read] == [(p.name, p.features) for p in also_read]
    for of_files, of_tables in zip(files.views, tables.views, strict=True):
        assert of_files.schema == of_tables.schema
        source = of_tables.batch_source
        assert isinstance(source, PostgreSQLSource)
        assert source.name == of_files.batch_source.name
        assert source.timestamp_field == of_files.batch_source.timestamp_field
        assert source.created_timestamp_column == of_files.batch_source.created_timestamp_column
        assert source.get_table_query_string() == of_tables.name


def test_plain_feast_and_our_command_apply_the_same(
    home: Home, database_url: str, fork_server: None
) -> None:
    variables = store_variables(home)
    yaml = profile_file(home, "production")
    assert database_url.split("@")[0].rsplit(":", 1)[1] not in yaml.read_text(encoding="utf-8")
    said = feast(yaml, variables, "apply")
    assert "Deploying infrastructure for user_sequences" in said
    ours = run(home, "apply")
    assert ours.exit_code == 0, ours.stderr
    assert json.loads(ours.stdout)["services"] == ["ctr_v1", "retrieval_v1"]
    again = feast(yaml, variables, "plan")
    assert "No changes to registry" in again
    assert "No changes to infrastructure" in again
    assert variables["LONGTRAIL_DATABASE_PASSWORD"] not in said + again
    with psycopg.connect(database_url) as connection:
        names = connection.execute("SELECT feature_view_name FROM feature_views").fetchall()
    assert ("user_sequences",) in names
    assert not (home.root / "services").exists()


def test_a_command_without_addresses_runs_servers_of_its_own(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(scratch / "home")
    done = run(home, "apply")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["views"]
    status = local.status(home)
    assert not status.postgres.running
    assert not status.redis.running
    started = json.loads(run(home, "services", "start").stdout)
    assert started["postgres"]["running"]
    try:
        shell = run(home, "services", "env").stdout
        # The checked-in file: its stores are where the variables say.
        script = f"{shell}\nexec {FEAST} -f production.yaml feature-views list"
        environment = {k: v for k, v in os.environ.items() if not k.startswith(OURS)}
        listed = subprocess.run(
            ["sh", "-c", script], cwd=REPO_FOLDER, capture_output=True, text=True, check=True,
            env={**environment, "PYTHONPATH": str(PROJECT_ROOT), "PYTHONWARNINGS": "ignore"},
        ).stdout  # fmt: skip
        assert "user_sequences" in listed
        assert json.loads(run(home, "services", "status").stdout) == started
    finally:
        stopped = json.loads(run(home, "services", "stop").stdout)
    assert not stopped["postgres"]["running"]
    # One address alone: only the other server starts.
    monkeypatch.setenv(REDIS_URL, "redis://127.0.0.1:1")
    open_store(home, "production")
    try:
        status = local.status(home)
        assert (status.postgres.running, status.redis.running) == (True, False)
        assert status.in_use
    finally:
        local.release(home)
    assert not local.status(home).postgres.running


def test_shell_lines_need_servers_or_addresses(tmp_path: Path) -> None:
    done = run(Home(tmp_path), "services", "env")
    assert done.exit_code == 1
    assert "run `longtrail services start` first" in done.stderr


@pytest.mark.parametrize("name", [DATABASE_URL, REDIS_URL])
def test_a_bad_address_is_a_mistake_and_starts_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "mysql://u:tiger@h/d")
    done = run(Home(tmp_path), "apply")
    assert done.exit_code == 1
    assert f"Error: {name} cannot be used: its scheme" in done.stderr
    assert "tiger" not in done.output
    assert not (tmp_path / "services").exists()
    assert HOME_VARIABLE not in done.output
