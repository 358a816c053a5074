"""Versions beside each other: promoted, rolled back and removed, on both profiles' real stores."""

import json
import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis
from click.testing import CliRunner, Result

from feature_repo.artifact import ArtifactManifest, load_current_run, set_current_run
from feature_repo.cli_versions import commands
from feature_repo.command import SentenceGroup, Settings
from feature_repo.connections import DATABASE_URL, REDIS_URL
from feature_repo.definitions import RETRIEVAL_SERVICE, define
from feature_repo.errors import ArtifactError, LongtrailError, MissingStepError
from feature_repo.feast_bytes import feature_field
from feature_repo.garbage import collect_garbage
from feature_repo.home import Home
from feature_repo.materialize import apply, materialize
from feature_repo.postgres_session import Database
from feature_repo.postgres_versions import versioned_tables
from feature_repo.profiles import open_store
from feature_repo.publish import publish
from feature_repo.reader import FeatureReader
from feature_repo.version_names import (
    ENCODER_FILE,
    encoder_view,
    run_version,
    run_view,
    unversioned,
)
from feature_repo.versions import list_versions, promote, roll_back
from tests.feature_repo.conftest import write_files
from tests.feature_repo.test_reader import ENCODER, build

OTHER = ENCODER.model_copy(update={"fingerprint": "def", "split_layer": 2, "width": 3})
BEGUN = datetime(2024, 3, 1, tzinfo=UTC)
RUNS = ("bahe-1", "bahe-2", "bahe_2")  # the last two differ by what a table cannot be called


def write_encoder(home: Home, number: float) -> None:
    """The vectors of a second encoder, each full of one number."""
    folder = home.embeddings / OTHER.fingerprint
    folder.mkdir()
    OTHER.save(folder / ENCODER_FILE)
    first = pq.read_table(home.embeddings / ENCODER.fingerprint / "part-0.parquet")
    vectors = pa.array([[number] * OTHER.width] * first.num_rows, pa.list_(pa.float32()))
    names = pa.array([OTHER.fingerprint] * first.num_rows)
    table = first.set_column(1, "embedding", vectors)
    pq.write_table(table.set_column(2, "encoder_fingerprint", names), folder / "part-0.parquet")


def write_run(home: Home, run: str, number: int, **changes: Any) -> None:
    """An artifact without weights: nobody here scores."""
    values: dict[str, Any] = {
        "run": run, "created": BEGUN + timedelta(days=number), "dataset": "kitchen",
        "source_fingerprint": "", "feature_service": "ctr_v1", "scenes": ("buy", "look"),
        "sequence_length": 5, "user_dense_names": (), "item_dense_names": ("price",),
        "context_names": (), "evidence_names": (), "category_vocabularies": {"shelf": ("wood",)},
        "encoder_fingerprint": ENCODER.fingerprint, "encoder_width": 4, "recipe": "bahe_small",
        "config": {}, "seed": 0, "git_revision": None, "versions": {}, "train_start": BEGUN,
        "train_end": BEGUN, "metrics": {"test": {"auc": 0.5 + number / 10}},
    }  # fmt: skip
    manifest = ArtifactManifest.model_validate(values | changes)
    manifest.save(home.runs / run / "manifest.json")


def write_export(home: Home, run: str, number: float) -> None:
    """Vectors of two users and one item, each full of one number."""
    time = pa.array([BEGUN] * 2, pa.timestamp("us", tz="UTC"))
    for entity, ids, origin in (
        ("user", ["1", "2"], ("history_key", "computed_time")),
        ("item", ["P1"], ("text_id",)),
    ):
        folder = home.view(f"{entity}_embeddings") / run
        folder.mkdir(parents=True)
        columns = {
            f"{entity}_id": ids,
            "embedding": pa.array([[number] * 2] * len(ids), pa.list_(pa.float32())),
            "model_version": [run] * len(ids),
            **dict.fromkeys(origin, pa.array([7] * len(ids), pa.int64())),
            "event_timestamp": time[: len(ids)],
            "created_timestamp": time[: len(ids)],
        }
        pq.write_table(pa.table(columns), folder / "part-00000.parquet")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """An embedded home with one encoder and one run, built, applied and online."""
    folder = tmp_path_factory.mktemp("versions")
    write_files(folder)
    built = Home(folder / "home")
    build(built, folder)
    ENCODER.save(built.embeddings / ENCODER.fingerprint / ENCODER_FILE)
    write_run(built, "good", 0)
    set_current_run(built, "good")
    return built


@pytest.fixture
def home(template: Home, tmp_path: Path) -> Home:
    """A copy of its tables, features and runs, nothing of its stores."""
    # Applying a copied registry would drop the tables of the online store that it speaks of.
    stores = shutil.ignore_patterns("*.db", "materialized-*")
    return Home(shutil.copytree(template.root, tmp_path / "home", ignore=stores))


@pytest.fixture(params=["embedded", "production"])
def settings(
    request: pytest.FixtureRequest, home: Home, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Settings]:
    """A home with two encoders and three runs of which two were exported, in stores of its own."""
    before = dict(os.environ)
    if request.param == "production":
        monkeypatch.setenv(DATABASE_URL, request.getfixturevalue("database_url"))
        monkeypatch.setenv(REDIS_URL, request.getfixturevalue("redis_url"))
    shutil.rmtree(home.runs)
    write_encoder(home, 7)
    write_run(home, RUNS[0], 1)
    write_run(home, RUNS[1], 2, encoder_fingerprint=OTHER.fingerprint, encoder_width=3)
    write_run(home, RUNS[2], 3)
    for number, run in enumerate(RUNS[:2]):
        write_export(home, run, number + 1)
    set_current_run(home, RUNS[0])
    made = Settings(home, request.param)
    bring_online(made)
    yield made
    os.environ.clear()
    os.environ.update(before)


def bring_online(settings: Settings) -> None:
    publish(settings)
    apply(settings.home, settings.profile)
    materialize(settings.home, settings.profile)


def run(settings: Settings, *arguments: str) -> Result:
    group = SentenceGroup(commands={str(command.name): command for command in commands})
    return CliRunner().invoke(group, list(arguments), obj=settings, catch_exceptions=False)


def behaviors(home: Home) -> np.ndarray[Any, np.dtype[np.int64]]:
    found: np.ndarray[Any, np.dtype[np.int64]] = pq.read_table(home.behaviors)[
        "behavior_id"
    ].to_numpy()
    return found


def users_vectors(reader: FeatureReader, **version: str) -> list[list[float]]:
    for_users = [
        reader.deep_outputs("user", ["1", "2", "nobody"], source=source, **version)  # type: ignore[arg-type]
        for source in ("offline", "online")
    ]
    np.testing.assert_array_equal(for_users[0], for_users[1])
    assert np.isnan(for_users[0][2]).all()
    vectors: list[list[float]] = for_users[0][:2].tolist()
    return vectors


def retrieval_views(reader: FeatureReader) -> set[str]:
    service = reader.store.get_feature_service(RETRIEVAL_SERVICE)
    return {projection.name for projection in service.feature_view_projections}


def test_each_version_is_read_and_a_switch_mixes_nothing(settings: Settings) -> None:
    home, profile = settings.home, settings.profile
    old = FeatureReader(home, profile)  # opened before the switch, as a server is
    ids = behaviors(home)
    first = old.vectors(ids, source="online")
    assert first.shape == (len(ids), 4)
    assert users_vectors(old) == [[1, 1], [1, 1]]
    names = {
        p.name for p in old.store.get_feature_service(RETRIEVAL_SERVICE).feature_view_projections
    }
    assert names == {run_view("user", RUNS[0]), run_view("item", RUNS[0])}

    switch = promote(home, profile, RUNS[1])
    assert (switch.run, switch.was, switch.encoder) == (RUNS[1], RUNS[0], "def")
    assert switch.to_materialize == ()
    new = FeatureReader(home, profile)
    for source in ("offline", "online"):
        vectors = new.vectors(ids, source=source)
        assert vectors.tolist() == [[7] * 3] * len(ids)
    assert users_vectors(new) == [[2, 2], [2, 2]]
    assert retrieval_views(new) == {run_view("user", RUNS[1]), run_view("item", RUNS[1])}
    # Who named the old version goes on with it.
    assert users_vectors(old, run=RUNS[0]) == [[1, 1], [1, 1]]
    again = old.vectors(ids, source="online", encoder=ENCODER.fingerprint)
    assert again.tobytes() == first.tobytes()

    back = roll_back(home, profile)
    assert (back.run, back.was) == (RUNS[0], RUNS[1])
    assert users_vectors(FeatureReader(home, profile)) == [[1, 1], [1, 1]]
    with pytest.raises(ArtifactError, match=r"no run was served before 'bahe-1'.*promote RUN"):
        roll_back(home, profile)
    with pytest.raises(MissingStepError, match="run `longtrail export` and `longtrail apply`"):
        new.deep_outputs("item", ["P1"], source="online", run=RUNS[2])


def test_collection_keeps_what_is_served_and_what_can_be_again(settings: Settings) -> None:
    home, profile = settings.home, settings.profile
    promote(home, profile, RUNS[2])
    dry = collect_garbage(home, profile, keep=0, dry_run=True)
    assert dry.kept_runs == (RUNS[0], RUNS[2])  # the one before, and the served one
    assert dry.kept_encoders == ("abc",)
    assert (dry.runs, dry.encoders) == ((RUNS[1],), ("def",))
    gone = sorted([encoder_view("def"), run_view("user", RUNS[1]), run_view("item", RUNS[1])])
    assert list(dry.views) == gone
    assert dry.online_rows == len(behaviors(home)) + 3
    assert dry.file_bytes > 1000
    assert (home.embeddings / "def").is_dir()

    rest = feature_field("items", "a column that is gone")
    if profile == "production":
        with redis.Redis.from_url(os.environ[REDIS_URL]) as client:
            for key in client.scan_iter(_type="HASH"):
                client.hset(key, rest, b"x")
    done = collect_garbage(home, profile, keep=0)
    assert done == dry
    if profile == "production":
        with redis.Redis.from_url(os.environ[REDIS_URL]) as client:
            holders = [key for key in client.scan_iter(_type="HASH") if client.hexists(key, rest)]
        assert all(key.startswith(b"longtrail:") for key in holders)
        assert holders  # ours beside Feast's, which nobody looked into
    assert not (home.embeddings / "def").exists()
    assert not (home.runs / RUNS[1]).exists()
    assert not (home.view("user_embeddings") / RUNS[1]).exists()
    store = open_store(home, profile)
    assert not set(gone) & {view.name for view in store.list_feature_views()}
    if profile == "production":
        tables = versioned_tables(Database(store.config.offline_store))
        assert tables.keys() == {
            encoder_view("abc"), run_view("user", RUNS[0]), run_view("item", RUNS[0])
        }  # fmt: skip
        assert set(done.tables) == set(gone)
        assert done.table_bytes > 0
        with psycopg.connect(os.environ[DATABASE_URL]) as connection:
            parts = connection.execute("SELECT DISTINCT table_name FROM longtrail_parts").fetchall()
        assert not set(gone) & {name for (name,) in parts}
    reader = FeatureReader(home, profile)
    assert users_vectors(reader, run=RUNS[0]) == [[1, 1], [1, 1]]
    assert not np.isnan(reader.vectors(behaviors(home), source="online")).any()
    assert all(view.num_rows == 0 for view in materialize(home, profile))  # nothing was lost
    nothing = collect_garbage(home, profile, keep=0)
    assert (nothing.runs, nothing.views, nothing.tables, nothing.online_rows) == ((), (), (), 0)
    assert roll_back(home, profile).run == RUNS[0]


def test_a_collection_that_was_killed_is_finished_by_the_next(settings: Settings) -> None:
    home, profile = settings.home, settings.profile
    promote(home, profile, RUNS[2])
    # As after a kill in the middle: the files of the run are gone, its views are still applied.
    for path in (home.runs / RUNS[1] / "manifest.json",):
        path.unlink()
        path.parent.rmdir()
    done = collect_garbage(home, profile, keep=0)
    assert done.runs == (RUNS[1],)  # known by what was exported
    assert done.online_rows == len(behaviors(home)) + 3
    assert collect_garbage(home, profile, keep=0).views == ()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"encoder_fingerprint": "gone"}, r"reads vectors of encoder gone, which are not in"),
        ({"scenes": ("buy", "dream")}, r"reads the scene 'dream', which the feature store does"),
        ({"user_dense_names": ("height",)}, r"reads the user feature 'height'"),
        ({"item_dense_names": ("weight",)}, r"reads the item feature 'weight'"),
        ({"category_vocabularies": {"hue": ()}}, r"reads the category 'hue'"),
        ({"sequence_length": 101}, r"reads 101 behaviours per scene, the feature store keeps 100"),
        ({"encoder_width": 5}, r"reads vectors of 5 numbers, those of encoder abc have 4"),
    ],
)
def test_what_does_not_fit_is_refused(
    template: Home, changes: dict[str, Any], sentence: str
) -> None:
    write_run(template, "misfit", 2, **changes)
    with pytest.raises(ArtifactError, match=sentence):
        promote(template, "embedded", "misfit")
    assert load_current_run(template).run == "good"
    shutil.rmtree(template.runs / "misfit")


def test_refusals_of_the_commands(home: Home, tmp_path: Path) -> None:
    settings = Settings(home, "embedded")
    said = run(settings, "promote", "nothing")
    assert said.exit_code == 1
    assert "there is no finished run 'nothing'" in said.stderr
    assert "there are: good" in said.stderr
    said = run(settings, "rollback")
    assert said.exit_code == 1
    assert "no run was served before 'good'" in said.stderr
    assert run(settings, "gc", "--keep", "-1").exit_code == 2
    said = run(Settings(Home(tmp_path / "empty"), "embedded"), "rollback")
    assert said.exit_code == 1
    assert "run `longtrail train` first" in said.stderr
    write_encoder(home, 1)
    with home.lock("embeddings"), pytest.raises(LongtrailError, match="writing embeddings"):
        collect_garbage(home, "embedded", keep=0)


def test_the_list_says_who_uses_whom(home: Home) -> None:
    write_encoder(home, 1)
    write_run(home, "later", 2)
    write_export(home, "later", 1)
    set_current_run(home, "later")
    listed = json.loads(run(Settings(home, "embedded"), "versions").stdout)
    assert [(r["run"], r["current"], r["before"], r["exported"]) for r in listed["runs"]] == [
        ("later", True, False, True),
        ("good", False, True, False),
    ]
    assert listed["runs"][0]["test_auc"] == pytest.approx(0.7)
    size = sum(p.stat().st_size for p in home.root.rglob("later/*"))
    assert listed["runs"][0]["size_bytes"] == size
    first, second = listed["encoders"]
    assert (first["fingerprint"], first["current"], first["served"]) == ("abc", True, True)
    assert first["runs"] == ["good", "later"]
    assert (second["fingerprint"], second["current"], second["runs"]) == ("def", False, [])
    assert list_versions(home).encoders[0].width == 4


def test_history_is_what_was_served(tmp_path: Path) -> None:
    home = Home(tmp_path)
    for name in ("a", "b", "b", "a", "c"):
        set_current_run(home, name)
    assert load_current_run(home).before == ("a", "b", "a")
    (home.runs / "current.json").write_text('{"run": "of an older version"}')
    assert load_current_run(home).before == ()


def test_names_of_versions() -> None:
    assert len({run_version(run) for run in RUNS}) == 3
    assert unversioned(encoder_view("abc")) == "behavior_embeddings"
    assert unversioned(run_view("item", "x")) == "item_embeddings"
    assert unversioned("items") == "items"
    # What Feast puts into SQL without quotes.
    assert run_view("user", "Bahe Größe-1").isidentifier()


def test_views_of_half_written_versions_are_not_defined(home: Home) -> None:
    write_export(home, "half.part", 1)
    names = {view.name for view in define(home).views}
    assert run_view("user", "half.part") not in names
