"""The plain feast command in feature_repo/, as a user of Feast expects it to work."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from feast.repo_operations import get_repo_files

from feature_repo.definitions import SHOP_MANIFEST, define
from feature_repo.errors import StoreError
from feature_repo.home import HOME_VARIABLE, PROJECT_ROOT, Home
from feature_repo.manifest import load_manifest
from feature_repo.profiles import (
    REPO_FOLDER,
    active_home,
    open_store,
    profile_file,
    profile_text,
)
from tests.feature_repo.conftest import write_files
from tests.feature_repo.test_reader import build
from tests.forked import feast as plain_feast
from tests.forked import run_forked

FEAST = Path(sys.executable).parent / "feast"


def environment() -> dict[str, str]:
    variables = {**os.environ, "FEAST_USAGE": "False", "PYTHONWARNINGS": "ignore"}
    variables.pop(HOME_VARIABLE, None)
    return variables


def feast(yaml: Path, *arguments: str) -> str:
    """What the feast command says, in a process with everything imported."""
    done = run_forked(
        plain_feast,
        ["-f", str(yaml), *arguments],
        output=yaml.with_name("said"),
        folder=REPO_FOLDER,
        variables=environment(),
    )
    assert done.code == 0, done.said
    return done.said


def test_feast_sees_one_file() -> None:
    assert get_repo_files(REPO_FOLDER) == [REPO_FOLDER / "repo.py"]


def test_every_object_says_what_it_is(tmp_path: Path) -> None:
    definitions = define(Home(tmp_path))
    for thing in (*definitions.entities, *definitions.views, *definitions.services):
        assert thing.description, thing.name
        assert thing.owner, thing.name
        assert thing.tags, thing.name
    for view in definitions.views:
        assert view.ttl.total_seconds() > 0
        assert view.batch_source.created_timestamp_column
        for field in view.schema:
            assert field.description, f"{view.name}.{field.name}"
    assert {view.name for view in definitions.views} == {
        "behavior_embeddings",
        "user_sequences",
        "user_stats",
        "items",
        "item_neighbors",
        "user_embeddings",
        "item_embeddings",
    }
    assert {service.name for service in definitions.services} == {"ctr_v1", "retrieval_v1"}
    for entity in definitions.entities:
        assert entity.value_type.name in ("STRING", "INT64")


def test_apply_before_any_ingest_declares_the_built_in_shop(
    tmp_path: Path, fork_server: None
) -> None:
    yaml = profile_file(Home(tmp_path / "home"), "embedded")
    done = subprocess.run(
        [str(FEAST), "-f", str(yaml), "apply"], cwd=REPO_FOLDER, env=environment(),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "user_sequences" in done.stdout
    assert "No changes to registry" in feast(yaml, "plan")


def test_apply_plan_materialize_and_list_work_unchanged(tmp_path: Path, fork_server: None) -> None:
    write_files(tmp_path)
    home = Home(tmp_path / "home")
    build(home, tmp_path)
    yaml = profile_file(home, "embedded")
    for command in ("plan", "apply", "plan"):
        said = feast(yaml, command)
        assert "No changes to registry" in said
        assert "No changes to infrastructure" in said
    assert "user_sequences" in feast(yaml, "feature-views", "list")
    # What plain Feast writes is what longtrail had written.
    ours = online_rows(home)
    assert len(ours) > 500
    with sqlite3.connect(home.online_store) as connection:
        for table in online_tables(connection):
            connection.execute(f'DELETE FROM "{table}"')
    assert not online_rows(home)
    now = load_manifest(home).now().replace(tzinfo=None)
    feast(yaml, "materialize", "1970-01-01T00:00:00", now.isoformat())
    assert online_rows(home) == ours
    later = feast(yaml, "materialize-incremental", "2024-07-01T00:00:00")
    assert "user_sequences" in later


def online_tables(connection: sqlite3.Connection) -> list[str]:
    """Feast's own, not ours beside them."""
    rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    return sorted(name for (name,) in rows if name != "longtrail_marks")


def online_rows(home: Home) -> dict[tuple[str, bytes, str], tuple[bytes, str]]:
    """Every value of the online store by table, key and feature, with its event time."""
    with sqlite3.connect(home.online_store) as connection:
        return {
            (table, key, feature): (value, time)
            for table in online_tables(connection)
            for key, feature, value, time in connection.execute(
                f'SELECT entity_key, feature_name, value, event_ts FROM "{table}"'
            )
        }


def test_the_built_in_shops_columns_are_those_declared_without_it(tmp_path: Path) -> None:
    from feature_repo.dataset import DATASETS, load_dataset
    from feature_repo.ingest import ingest
    from feature_repo.shop import ShopConfig, generate_shop

    generate_shop(tmp_path / "shop", ShopConfig(num_users=50, num_events=1000))
    home = Home(tmp_path / "home")
    ingest(home, load_dataset(DATASETS / "shop.toml", data_dir=tmp_path / "shop"))
    manifest = load_manifest(home)
    for name in ("scenes", "item_columns", "context_columns", "impressions", "dataset"):
        assert getattr(manifest, name) == getattr(SHOP_MANIFEST, name), name


def test_a_home_elsewhere_is_not_mixed_with_the_default_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEAST_FS_YAML_FILE_PATH", raising=False)
    monkeypatch.delenv(HOME_VARIABLE, raising=False)
    assert active_home() == Home(PROJECT_ROOT / "var")
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    with pytest.raises(StoreError, match="run `feast -f"):
        active_home()
    monkeypatch.setenv("FEAST_FS_YAML_FILE_PATH", str(profile_file(Home(tmp_path), "embedded")))
    assert active_home() == Home(tmp_path)


def test_the_default_home_is_spelled_as_feast_spells_it(tmp_path: Path) -> None:
    """Feast joins the repo folder and the path in the yaml; another spelling is another table."""
    here = profile_text(Home(PROJECT_ROOT / "var"), "embedded")
    assert f"path: {REPO_FOLDER}/../var/online_store.db" in here
    assert f"path: {tmp_path}/online_store.db" in profile_text(Home(tmp_path), "embedded")


def test_an_unknown_profile_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no profile 'prodution'; expected embedded"):
        profile_file(Home(tmp_path), "prodution")


def test_a_registry_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "registry.db").write_text("something else " * 100, encoding="utf-8")
    with pytest.raises(StoreError, match=r"registry\.db cannot be used .*: check the file"):
        open_store(Home(tmp_path), "embedded")
