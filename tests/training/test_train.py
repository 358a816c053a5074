import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from encoders.checkpoint import checkpoint_folder
from encoders.loaded_artifact import load_artifact, read_program
from feature_repo.artifact import ArtifactManifest, current_run, load_run_manifest
from feature_repo.errors import ArtifactError, DataSetError
from tests.training.world import LENGTH, SCENES, make_world, small_recipe
from training.artifact import load_model
from training.calibration import CalibratedModel
from training.checkpoint import find_unfinished
from training.dataset import read_clicks
from training.impressions import load_impressions
from training.recipes import RECIPES, Recipe, TrainingConfig
from training.scoring import probabilities, score
from training.train import read_splits, train

PROJECT = Path(__file__).resolve().parents[2]


def test_bahe_learns_from_text_what_popularity_cannot_know(bahe, popularity):
    assert bahe.metrics["test"]["auc"] > 0.8
    assert popularity.metrics["test"]["auc"] < 0.6
    assert popularity.metrics["test"]["ne"] == pytest.approx(1, abs=0.02)


def test_the_first_model_that_is_no_baseline_is_served(world, bahe, popularity):
    assert current_run(world.sources.home) == "bahe"


def test_artifact_says_what_it_is(world, bahe):
    manifest = ArtifactManifest.load(bahe.folder / "manifest.json", made_by="longtrail train")
    assert manifest.run == "bahe"
    assert manifest.scenes == SCENES
    assert manifest.sequence_length == LENGTH
    assert manifest.user_dense_names == ("view_total",)
    assert manifest.item_dense_names == ("price", "view_count_90d")
    assert manifest.context_names == ("hour",)
    assert set(manifest.category_vocabularies["brand"]) == {"a", "b"}
    assert manifest.encoder_fingerprint == "table-1"
    assert manifest.config["model"]["kind"] == "BaheConfig"
    assert manifest.metrics["test"]["auc"] == bahe.metrics["test"]["auc"]
    train_times = world.impressions.query("split == 'train'")["event_timestamp"]
    assert manifest.train_start == train_times.min()
    assert manifest.train_end == train_times.max()
    assert sorted(p.name for p in bahe.folder.iterdir()) == [
        "head.pt2",
        "items.pt2",
        "manifest.json",
        "reference.json",
        "users.pt2",
        "weights.safetensors",
    ]
    assert not list(world.sources.home.runs.glob("*.part"))


def test_nothing_in_the_archive_is_pickled(bahe, tmp_path):
    for path in bahe.folder.glob("*.pt2"):
        with zipfile.ZipFile(path) as archive:
            # A pickle of protocol 2 or later begins with 0x80 and its protocol; zips begin with PK.
            for info in archive.infolist():
                begin = archive.read(info)[:2]
                assert not (info.filename.endswith((".pt", ".pkl")) and begin), info.filename
    path, poisoned = bahe.folder / "head.pt2", tmp_path / "head.pt2"
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(poisoned, "w") as copy:
        for info in archive.infolist():
            content = b"\x80\x02." if info.filename.endswith(".pt") else archive.read(info)
            copy.writestr(info.filename, content)
    with pytest.raises(ArtifactError, match="would be unpickled"):
        read_program(poisoned)


def test_program_scores_what_the_eager_model_scores(world, bahe):
    sources = world.sources
    data = read_clicks(
        load_impressions(sources.home, sources.manifest, "test"),
        sources.reader,
        sources.table,
        scenes=SCENES,
        sequence_length=LENGTH,
    )
    table = torch.from_numpy(sources.table.vectors)
    manifest = load_run_manifest(sources.home, "bahe")
    model = CalibratedModel(load_model(sources, manifest), manifest.calibration)
    eager = score(model, table, data, truncate=True)
    program = score(load_artifact(sources.home, "bahe").score, table, data, truncate=False)
    np.testing.assert_allclose(program, eager, atol=1e-4)


def test_the_best_validation_is_kept(bahe):
    best = max(entry["valid_auc"] for entry in bahe.history)
    assert bahe.metrics["valid"]["auc"] == pytest.approx(best, abs=1e-6)
    assert [entry["epoch"] for entry in bahe.history] == list(range(1, 9))
    assert bahe.history[-1]["train_loss"] < bahe.history[0]["train_loss"]


@pytest.fixture(scope="module")
def whole(world):
    return train(world.sources, small_recipe(), run="whole", threads=1)


def test_result_tells_how_fast_it_learned(whole, popularity):
    assert whole.num_processes == 1
    assert whole.num_rows / whole.seconds < whole.rows_per_s < 1e6
    assert popularity.rows_per_s is None


def test_another_seed_gives_other_weights(world, whole):
    other = train(world.sources, small_recipe(seed=1), run="other-seed", threads=1)
    first, second = (load_file(r.folder / "weights.safetensors") for r in (whole, other))
    assert not torch.equal(first["tower.output.weight"], second["tower.output.weight"])


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.training.world import make_world, small_recipe
from training.train import read_splits, train

rows = 0
def learning(advance, total, **figures):
    global rows
    rows += advance
    if rows > 0.6 * total:
        os.kill(os.getpid(), signal.SIGKILL)

world = make_world(Path(sys.argv[1]))
train(world.sources, small_recipe(checkpoint_every_steps=4), threads=1, learning=learning)
"""


def test_killed_run_goes_on_and_ends_with_the_weights_of_the_same_seed(world, whole, tmp_path):
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "home")],
        cwd=PROJECT,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    home = world.sources.home.__class__(tmp_path / "home")
    assert not list(home.runs.glob("*/manifest.json"))
    told = []

    def learning(advance: int, total: int, **figures: float) -> None:
        told.append(advance)

    scored = []
    resumed = train(
        replace(world.sources, home=home),
        small_recipe(checkpoint_every_steps=4),
        threads=1,
        learning=learning,
        scoring=lambda advance, total: scored.append((advance, total)),
    )
    assert resumed.resumed
    assert resumed.run.startswith("bahe_tiny-")
    most = 5 * 16 * 4  # four steps and the killed one, of 16 contexts with 4 rows each
    assert told[0] > 0.6 * 3 * resumed.num_rows - most
    assert sum(told) == 3 * resumed.num_rows
    in_all = sum(resumed.metrics[split]["num_rows"] for split in ("valid", "test"))
    assert sum(advance for advance, _ in scored) == in_all
    assert {total for _, total in scored} == {in_all}
    first, second = (load_file(r.folder / "weights.safetensors") for r in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert whole.history == resumed.history
    assert whole.metrics == resumed.metrics
    assert not list(home.runs.glob("*.part"))


def test_an_unfinished_run_goes_on_only_with_its_own_settings(world):
    class StoppedError(Exception):
        pass

    def stop(advance: int, total: int, **figures: float) -> None:
        if figures.get("loss") is not None:
            stop.rows += advance
        if stop.rows > total / 2:
            raise StoppedError

    stop.rows = 0
    recipe = small_recipe("stopped", epochs=2)
    with pytest.raises(StoppedError):
        train(world.sources, recipe, run="stopped-1", threads=1, learning=stop)
    home = world.sources.home
    state = json.loads((home.runs / "stopped-1.checkpoint.part" / "state.json").read_text())
    assert find_unfinished(home, "stopped", state["fingerprint"]) == "stopped-1"
    assert find_unfinished(home, "stopped", "other") is None
    other = replace(recipe, training=replace(recipe.training, seed=5))
    with pytest.raises(ArtifactError, match="begun with other settings"):
        train(world.sources, other, run="stopped-1", threads=1)


def test_a_checkpoint_of_another_version_is_refused_with_what_to_do(world):
    folder = world.sources.home.runs / "older-1.checkpoint.part"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text('{"fingerprint": "x", "epochs_done": 1}')
    with pytest.raises(ArtifactError, match="begun with another version: delete"):
        train(world.sources, small_recipe("older"), run="older-1", threads=1)
    assert find_unfinished(world.sources.home, "older", "x") is None
    shutil.rmtree(folder)


def test_a_run_killed_behind_its_artifact_ends_once_more(world, popularity):
    folder = checkpoint_folder(world.sources.home.runs / popularity.run)
    with pytest.raises(ArtifactError, match="there is a run"):
        train(world.sources, RECIPES["popularity"](), run=popularity.run, threads=1)
    folder.mkdir()
    again = train(world.sources, RECIPES["popularity"](), run=popularity.run, threads=1)
    assert again.metrics == popularity.metrics
    assert not folder.exists()


def test_names_that_cannot_be_used(world, bahe):
    with pytest.raises(ArtifactError, match="there is a run 'bahe' already"):
        train(world.sources, small_recipe(), run="bahe")
    for name in ("../x", ".hidden", "x.part"):
        with pytest.raises(ArtifactError, match="is no name for a folder"):
            train(world.sources, small_recipe(), run=name)


def test_labels_of_one_class_are_refused(tmp_path):
    world = make_world(tmp_path / "home", num_users=40)
    world.impressions.assign(clicked=0).to_parquet(world.sources.home.impressions)
    with pytest.raises(DataSetError, match="every impression of the train split has clicked = 0"):
        train(world.sources, small_recipe(), threads=1)
    assert not list(world.sources.home.runs.glob("*"))


def test_extra_requests_are_learned_from_unless_the_recipe_says_no(tmp_path):
    world = make_world(tmp_path / "home", num_users=60)
    rows = world.impressions
    is_extra = (rows["split"] == "train") & rows["request_id"].str.endswith("-1")
    rows.assign(split=rows["split"].mask(is_extra, "extra")).to_parquet(
        world.sources.home.impressions
    )
    recipe = RECIPES["item_only"]()
    without = replace(recipe, training=replace(recipe.training, extra_requests=False))
    num_train, num_extra = int((rows["split"] == "train").sum()), int(is_extra.sum())
    assert num_extra > 50
    assert train(world.sources, recipe, run="a", threads=1).num_rows == num_train
    assert train(world.sources, without, run="b", threads=1).num_rows == num_train - num_extra
    # One reading serves both; where it left the extra rows out, no recipe can ask for them.
    both = read_splits(world.sources, recipe.sequence_length)
    given = train(world.sources, without, run="c", threads=1, data=both)
    assert given.num_rows == num_train - num_extra
    assert given.metrics == load_run_manifest(world.sources.home, "b").metrics
    few = read_splits(world.sources, recipe.sequence_length, with_extra=False)
    assert train(world.sources, recipe, run="d", threads=1, data=few).metrics == given.metrics


def test_a_share_of_the_contexts_is_learned_from_and_all_else_is_scored(world):
    recipe = RECIPES["item_only"]()
    recipe = replace(recipe, training=replace(recipe.training, context_share=0.25))
    data = read_splits(world.sources, recipe.sequence_length)
    part = train(world.sources, recipe, run="part", threads=1, data=data)
    assert part.num_contexts == round(0.25 * data["train"].num_contexts)
    assert part.num_rows < len(data["train"]) / 2
    for split in ("valid", "test"):
        assert part.metrics[split]["num_rows"] == len(data[split])
    with pytest.raises(ValueError, match=r"context_share must be in \(0, 1\], got 0"):
        replace(recipe.training, context_share=0)


@pytest.mark.parametrize("name", ["repeat_count", "mean_pooling", "din_text", "item_only"])
def test_every_baseline_trains_and_writes_an_artifact(world, name):
    result = train(world.sources, RECIPES[name](), run=name, threads=1)
    assert 0 <= result.metrics["test"]["auc"] <= 1
    assert callable(load_artifact(world.sources.home, name).score)


@pytest.mark.parametrize(
    ("changes", "programs"),
    [
        ({"id_width": 4}, {"users.pt2", "items.pt2", "head.pt2"}),
        ({"attention_over": "states"}, {"score.pt2"}),
    ],
)
def test_options_of_the_head_reach_the_artifact(tmp_path, changes, programs):
    sources = make_world(tmp_path / "home", num_users=48).sources
    recipe = small_recipe("options", epochs=1)
    # No deep half: its "states" are then the vectors with position and age, and export is quick.
    recipe = replace(recipe, model=replace(recipe.model, use_deep_half=False, **changes))
    result = train(sources, recipe, run="options", threads=1)
    assert {path.name for path in result.folder.iterdir()} == {
        *("manifest.json", "reference.json", "weights.safetensors"),
        *programs,
    }
    manifest = load_run_manifest(sources.home, "options")
    assert (manifest.parts is None) is (programs == {"score.pt2"})
    model = load_model(sources, manifest)
    if "id_width" in changes:
        assert set(model.ids.keys.tolist()) > {0}  # the items of the training rows
    data = read_splits(sources, LENGTH)["test"]
    table = torch.from_numpy(sources.table.vectors)
    program = load_artifact(sources.home, "options").score
    calibrated = CalibratedModel(model, manifest.calibration)
    np.testing.assert_allclose(
        score(program, table, data, truncate=False),
        score(calibrated, table, data, truncate=True),
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"epochs": -1}, "epochs must be at least 0"),
        ({"learning_rate": 0}, "learning_rate must be above 0"),
        ({"average_decay": 1.0}, r"average_decay must be in \(0, 1\)"),
        ({"batch_contexts": 0}, "batch_contexts must be at least 1"),
        ({"accumulate_batches": 0}, "accumulate_batches must be at least 1"),
        ({"checkpoint_every_steps": 0}, "checkpoint_every_steps must be at least 1"),
        ({"patience": 0}, "patience must be at least 1 or None"),
    ],
)
def test_bad_settings_say_what_is_allowed(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        TrainingConfig(**changes)


def test_every_recipe_is_registered_under_its_name():
    assert {name: recipe().name for name, recipe in RECIPES.items()} == {n: n for n in RECIPES}
    assert all(isinstance(recipe(), Recipe) and recipe.__doc__ for recipe in RECIPES.values())


def test_probabilities_do_not_overflow():
    values = probabilities(np.array([-1e4, 0, 1e4], np.float32))
    assert values.tolist() == [0, 0.5, 1]
