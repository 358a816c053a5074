import json
from dataclasses import asdict, replace
from datetime import UTC, datetime

import pytest

from encoders.table import EmbeddingTable
from encoders.tuning import HeldOut, TuningManifest
from feature_repo.artifact import MANIFEST_FILE, load_run_manifest
from feature_repo.errors import ArtifactError
from tests.training.tables import save_table
from tests.training.world import make_world, small_recipe
from training.ablations import (
    ABLATIONS,
    FULL,
    UNTUNED,
    ablate,
    already_trained,
    plan_variants,
    without_text,
)
from training.recipes import RECIPES, Recipe


def quick_recipe() -> Recipe:
    """Without a language model's layers, so that a run takes a second or two."""
    recipe = small_recipe("bahe_quick", epochs=1)
    return replace(recipe, model=replace(recipe.model, use_deep_half=False))


TEXT_FIELDS = {
    "use_text",
    "use_deep_half",
    "use_text_evidence",
    "use_target_attention",
    "next_behavior_weight",
}
CHOSEN = {"without-deep-half": ABLATIONS["without-deep-half"]}
"""Changes nothing here, so that two runs are trained: the full model and the untuned one."""


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("without-text", TEXT_FIELDS),
        ("without-deep-half", {"use_deep_half"}),
        ("without-age", {"use_age"}),
        ("without-exact-id", {"use_exact_evidence"}),
        ("frozen-deep-half", {"fine_tune"}),
    ],
)
def test_an_ablation_changes_what_it_names_and_nothing_else(name, fields):
    recipe = RECIPES["bahe_base"]()
    changed = ABLATIONS[name](recipe)
    before, after = asdict(recipe.model), asdict(changed.model)
    assert {field for field in before if before[field] != after[field]} == fields
    assert replace(changed, model=recipe.model) == recipe


def test_frozen_layers_are_not_also_to_be_trained():
    recipe = small_recipe()
    shallow = replace(recipe, model=replace(recipe.model, num_trained_layers=1))
    frozen = ABLATIONS["frozen-deep-half"](shallow)
    assert frozen == ABLATIONS["frozen-deep-half"](recipe)
    assert frozen.model.fine_tune == "frozen"


def test_without_exact_ids_there_are_no_vectors_of_ids_either():
    recipe = small_recipe()
    with_ids = replace(recipe, model=replace(recipe.model, id_width=4))
    without_ids = ABLATIONS["without-exact-id"](with_ids)
    assert without_ids == ABLATIONS["without-exact-id"](recipe)


def test_every_ablation_has_a_test():
    assert set(ABLATIONS) == {
        "without-text", "without-deep-half", "without-age", "without-exact-id", "frozen-deep-half"
    }  # fmt: skip


@pytest.fixture(scope="module")
def home_with_tuned_table(tmp_path_factory):
    """A small world whose current encoder was tuned, with the vectors of before beside it."""
    root = tmp_path_factory.mktemp("ablations")
    sources = make_world(root / "home", num_users=48).sources
    before = sources.table
    tuned = EmbeddingTable(before.ids, before.vectors[:, ::-1] * 2, "table-2")
    save_table(sources.home, before, model="base")
    save_table(sources.home, tuned, model=str(root / "tuned"), current=True)
    TuningManifest(
        created=datetime(2024, 1, 1, tzinfo=UTC),
        base_model="base",
        base_model_fingerprint="weights of base",
        split_layer=1,
        recipe="co_occurrence",
        until=datetime(2024, 1, 1, tzinfo=UTC),
        steps=1,
        seed=0,
        config={},
        dataset="small",
        source_fingerprint="small",
        git_revision=None,
        num_texts=48,
        num_pairs=1,
        user_share=1.0,
        seen_labels={},
        losses=[1.0],
        held_out=HeldOut(num_pairs=0, before=None, after=None),
    ).save(root / "tuned" / "tuning.json")
    return replace(sources, table=EmbeddingTable.open(sources.home))


@pytest.fixture(scope="module")
def study(home_with_tuned_table):
    return ablate(home_with_tuned_table, quick_recipe(), ablations=CHOSEN, threads=1)


def test_the_variants_are_trained_alike_and_compared_with_the_full_model(
    study, home_with_tuned_table
):
    home = home_with_tuned_table.home
    assert list(study.evaluations) == [FULL, UNTUNED]
    assert study.trained == ["bahe_quick-full-seed0", "bahe_quick-untuned-encoder-seed0"]
    assert study.notes == ["without-deep-half left out: bahe_quick has no such part"]
    full, untuned = (load_run_manifest(home, run) for run in study.trained)
    assert full.config["training"] == untuned.config["training"]
    assert (full.encoder_fingerprint, untuned.encoder_fingerprint) == ("table-2", "table-1")
    assert not home.current_run.exists()  # an ablation is never served
    assert study.evaluations[FULL].comparison == {}
    evaluation = study.evaluations[UNTUNED]
    whole = evaluation.comparison["all"]["auc"]
    assert whole["first"] == evaluation.metrics["auc"]
    assert whole["second"] == study.evaluations[FULL].metrics["auc"]
    assert whole["low"] <= whole["high"]
    assert untuned.metrics["test"]["auc"] == pytest.approx(evaluation.metrics["auc"])


def test_the_plan_names_every_run_and_changes_only_the_recipe(world):
    recipe = small_recipe("bahe_tiny", seed=4)
    variants, notes = plan_variants(world.sources, recipe, num_seeds=2)
    assert [variant.name for variant in variants] == [FULL, *ABLATIONS]
    assert variants[0].runs == ["bahe_tiny-full-seed4", "bahe_tiny-full-seed5"]
    for variant in variants[1:]:
        assert variant.runs == [f"bahe_tiny-{variant.name}-seed{seed}" for seed in (4, 5)]
        assert variant.recipe.model == ABLATIONS[variant.name](recipe).model
        assert variant.recipe.training == recipe.training
        assert variant.recipe.baseline
    assert notes == [f"{UNTUNED} left out: the current encoder is not a tuned one"]


def test_finished_runs_are_not_trained_again(study, home_with_tuned_table):
    again = ablate(home_with_tuned_table, quick_recipe(), ablations=CHOSEN, threads=1)
    assert again.trained == []
    found, expected = again.as_json(), study.as_json()
    assert found["variants"].keys() == expected["variants"].keys()
    for name, variant in found["variants"].items():
        assert variant["metrics"] == expected["variants"][name]["metrics"]
        assert variant["comparison"] == expected["variants"][name]["comparison"]


def test_a_run_of_other_settings_is_not_taken_for_finished(study, home_with_tuned_table):
    recipe = quick_recipe()
    longer = replace(recipe, training=replace(recipe.training, epochs=2))
    with pytest.raises(ArtifactError, match=r"bahe_quick-full-seed0' was trained with other sett"):
        ablate(home_with_tuned_table, longer, ablations=CHOSEN)


@pytest.fixture
def finished(world, popularity):
    """A run, what it was trained from, and its manifest, which is put back."""
    recipe = RECIPES["popularity"]()
    path = popularity.folder / MANIFEST_FILE
    before = path.read_text()
    yield world.sources, recipe, path
    path.write_text(before)


def test_a_run_of_before_a_setting_is_one_with_its_default(finished):
    sources, recipe, path = finished
    assert already_trained(sources, recipe, "popularity")
    manifest = json.loads(path.read_text())
    del manifest["config"]["training"]["extra_requests"]
    path.write_text(json.dumps(manifest))
    assert already_trained(sources, recipe, "popularity")
    other = replace(recipe, training=replace(recipe.training, extra_requests=False))
    with pytest.raises(ArtifactError, match="'popularity' was trained with other settings, data"):
        already_trained(sources, other, "popularity")


def test_a_run_with_a_setting_of_another_version_is_not_taken(finished):
    sources, recipe, path = finished
    manifest = json.loads(path.read_text())
    manifest["config"]["model"]["library"] = "lightgbm"
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="'popularity' was trained with other settings, data"):
        already_trained(sources, recipe, "popularity")


def test_a_run_on_other_data_or_vectors_is_not_taken(finished):
    sources, recipe, _ = finished
    assert not already_trained(sources, recipe, "another")
    table = EmbeddingTable(sources.table.ids, sources.table.vectors, "table-9")
    data = sources.manifest.model_copy(update={"source_fingerprint": "of more rows"})
    for other in (replace(sources, table=table), replace(sources, manifest=data)):
        with pytest.raises(ArtifactError, match=r"delete .*popularity to train it anew"):
            already_trained(other, recipe, "popularity")


def test_only_bahe_models_have_these_parts(home_with_tuned_table):
    with pytest.raises(ArtifactError, match="'popularity' is none: give --recipe bahe_small"):
        ablate(home_with_tuned_table, RECIPES["popularity"]())


def test_every_ablation_of_the_base_recipe_is_a_model_that_can_learn():
    full = RECIPES["bahe_base"]()
    for name, ablation in ABLATIONS.items():
        changed = ablation(full)
        assert changed != full, name
        assert changed.training == full.training, name
    assert without_text(full).model.evidence_kinds == ("same", "near")
