"""The deep-half benchmark: what its variants change, what is trained and told, what is missing."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import results_file
from benchmarks.bench_deep_half import compare_variants, page, study
from benchmarks.deep_half_plan import FROZEN, REFERENCE, recipes, seeded, variants
from benchmarks.quality_plan import SAME_BUDGET, SINGLE
from benchmarks.results_file import write_result
from feature_repo.artifact import MANIFEST_FILE
from feature_repo.errors import ArtifactError, LongtrailError
from tests.training.world import make_world, small_recipe
from training.ablations import ABLATIONS
from training.evaluate import ScoredRows
from training.overrides import override
from training.recipes import RECIPES, Recipe
from training.sources import Sources


# What is trained.
def test_the_recipes_are_those_whose_parts_can_be_changed():
    found = recipes()
    assert list(found) == [SAME_BUDGET, "bahe_small", "bahe_base", "bahe_large"]
    budget, whole = found[SAME_BUDGET], RECIPES[SINGLE]()
    assert budget.model == whole.model
    assert (budget.training.epochs, budget.training.extra_requests) == (1, False)


def test_every_variant_is_the_recipe_with_its_settings():
    recipe = recipes()[SAME_BUDGET]
    found, notes = variants(recipe, num_layers=3)
    assert next(iter(found)) == REFERENCE
    assert notes == ["layers_1_frozen left out: it is frozen", "layers_1 left out: it is trained"]
    for variant in found.values():
        assert variant.recipe == override(recipe, variant.settings)
    assert len({variant.recipe for variant in found.values()}) == len(found)
    assert found[REFERENCE].recipe == ABLATIONS["frozen-deep-half"](recipe)
    assert found["without"].recipe == ABLATIONS["without-deep-half"](recipe)
    assert found["trained"].recipe == recipe
    rates = {
        name: variant.recipe.training.deep_learning_rate / recipe.training.learning_rate
        for name, variant in found.items()
        if name.startswith("rate_")
    }
    assert rates == {f"rate_{rate:g}": pytest.approx(rate) for rate in (0.1, 0.3, 1, 3)}
    assert [found[f"layers_{n}"].recipe.model.num_deep_layers for n in (2, 3)] == [2, 3]
    top = found["layers_3_top_1"]
    assert (top.recipe.model.num_deep_layers, top.recipe.model.num_trained_layers) == (3, 1)
    assert found["without_next_behavior"].recipe.model.next_behavior_weight == 0
    assert found["over_states"].recipe.model.attends_states
    assert found["without_position"].recipe.model.position == "none"
    assert not found["without_age"].recipe.model.use_age


@pytest.mark.parametrize("name", list(recipes()))
def test_a_variant_and_its_frozen_twin_differ_in_what_learns_alone(name):
    found, _ = variants(recipes()[name], num_layers=3)
    for variant in found.values():
        twin = found[variant.frozen].recipe
        assert twin.model.fine_tune == "frozen"
        if variant.recipe.model.use_deep_half:
            model = replace(variant.recipe.model, fine_tune="frozen", num_trained_layers=None)
            depth = model.num_deep_layers or 3
            twin_depth = twin.model.num_deep_layers or 3
            assert replace(model, num_deep_layers=depth) == replace(
                twin.model, num_deep_layers=twin_depth
            )
    own = {found[name].frozen for name in found if name.endswith(FROZEN)}
    assert own == {name for name in found if name.endswith(FROZEN)}
    assert found["rate_1"].frozen == found["without"].frozen == found["trained"].frozen == REFERENCE


def test_depths_beyond_the_split_are_named():
    found, notes = variants(recipes()[SAME_BUDGET], num_layers=2)
    assert "layers_2_top_1" in found
    assert not [name for name in found if "layers_3" in name]
    assert notes[-1].startswith("layers_3 left out: 2 lie above the split; for more encode with")
    found, notes = variants(recipes()["bahe_large"], num_layers=2)
    assert "layers_2 left out: it is trained" in notes  # all layers, spelled otherwise
    assert found["layers_2_top_1"].frozen == REFERENCE
    found, notes = variants(recipes()[SAME_BUDGET], num_layers=1)
    assert not [name for name in found if name.startswith("layers")]
    assert len(notes) == 4


def test_runs_have_names_of_their_own_and_are_never_served():
    recipe = recipes()[SAME_BUDGET]
    found, _ = variants(recipe, num_layers=3)
    plan = [pair for name in found for pair in seeded(name, found[name], recipe, num_seeds=2)]
    assert len({run for _, run in plan}) == len(plan) == 2 * len(found)
    assert all(recipe.baseline for recipe, _ in plan)
    assert {recipe.training.seed for recipe, _ in plan} == {0, 1}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Sources:
    return make_world(tmp_path_factory.mktemp("deep_half") / "home", num_users=24).sources


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """A small head, so that a run takes seconds; two layers lie above the split, one is used."""
    recipe = small_recipe(epochs=1)
    head = {"use_target_attention": False, "use_text_evidence": False, "num_members": 1}
    model = replace(recipe.model, num_deep_layers=1, num_crosses=0, **head)
    return replace(recipe, model=model)


@pytest.fixture(scope="module")
def partial(sources, recipe) -> dict:
    """First the reference alone, then one more."""
    manifest = sources.home.runs / "deep_half-bahe_tiny-frozen-seed0" / MANIFEST_FILE
    first = study(sources, recipe, only=[REFERENCE], num_seeds=1, threads=1)
    assert list(first["variants"]) == [REFERENCE]
    before = manifest.stat().st_mtime_ns
    second = study(sources, recipe, only=["trained"], num_seeds=1, threads=1)
    assert manifest.stat().st_mtime_ns == before  # not trained again
    assert second["variants"][REFERENCE] == first["variants"][REFERENCE]
    return second


def test_a_study_holds_what_is_there_and_names_the_rest(partial, recipe):
    assert list(partial["variants"]) == [REFERENCE, "trained"]
    assert partial["num_layers_above_split"] == 2
    found, notes = variants(recipe, num_layers=2)
    assert partial["missing"] == [name for name in found if name not in (REFERENCE, "trained")]
    assert partial["notes"] == notes
    frozen, trained = partial["variants"].values()
    assert frozen["logloss"] != trained["logloss"]
    assert 0 < trained["valid_auc"] < 1
    assert page(partial).splitlines()[-1].startswith("Not trained: `without`, `rate_0.1`, ")


def test_unknown_variants_and_stale_runs_are_refused(partial, sources, recipe):
    with pytest.raises(LongtrailError, match=r"--only takes frozen, without, .* got layers_3; .*"):
        study(sources, recipe, only=["layers_3"], num_seeds=1, threads=1)
    longer = replace(recipe, training=replace(recipe.training, epochs=2))
    with pytest.raises(ArtifactError, match="'deep_half-bahe_tiny-frozen-seed0' was trained with"):
        study(sources, longer, num_seeds=1, threads=1)


# What is told.
QUALITY = {REFERENCE: 0.9, "trained": 1.0, f"over_states{FROZEN}": 0.7, "over_states": 0.8}
"""Variant -> how far its scores of clicked rows lie above those of others, in deviations."""


@pytest.fixture(scope="module")
def told() -> dict:
    """Two seeds of some variants, on made-up rows."""
    generator = np.random.default_rng(0)
    users = np.arange(400) // 10
    labels = generator.integers(0, 2, len(users))
    noise = generator.normal(size=len(users))
    of = {name: [f"{name}-{seed}" for seed in range(2)] for name in QUALITY}
    scored = ScoredRows(
        rows="test",
        labels=labels,
        users=users,
        masks={"novel": users < 20},
        manifests={
            run: SimpleNamespace(metrics={"valid": {"auc": 0.5 + 0.1 * seed}})
            for runs in of.values()
            for seed, run in enumerate(runs)
        },
        logits={
            run: (noise + (QUALITY[name] + 0.1 * seed) * labels).astype(np.float32)
            for name, runs in of.items()
            for seed, run in enumerate(runs)
        },
        notes=[],
    )
    found, notes = variants(recipes()[SAME_BUDGET], num_layers=3)
    return {
        "dataset": "small",
        "rows": "test",
        "recipe": SAME_BUDGET,
        "num_seeds": 2,
        "num_layers_above_split": 3,
        "variants": compare_variants(scored, found, of),
        "missing": [],
        "notes": notes,
    }


PAIRS = [
    ("trained", REFERENCE),
    (f"over_states{FROZEN}", REFERENCE),
    ("over_states", REFERENCE),
    ("over_states", f"over_states{FROZEN}"),
]


def test_variants_are_compared_with_the_reference_and_with_their_frozen_twin(told):
    of = told["variants"]
    assert [(name, rival) for name in of for rival in of[name]["against"]] == PAIRS
    for name, rival in PAIRS:
        for rows in ("all", "novel"):
            auc = of[name]["against"][rival][rows]["auc"]
            one, other = (v if rows == "all" else v["slices"][rows] for v in (of[name], of[rival]))
            assert auc["difference"] == pytest.approx(one["auc"] - other["auc"])
            assert auc["low"] < auc["difference"] < auc["high"]
        assert np.sign(of[name]["against"][rival]["all"]["auc"]["difference"]) == np.sign(
            QUALITY[name] - QUALITY[rival]
        )
    assert {values["valid_auc"] for values in of.values()} == {0.55}
    assert of["over_states"]["settings"] == ["model.attention_over=states"]


def test_the_page_tells_every_difference_with_its_interval(told, tmp_path, monkeypatch):
    lines = page(told).splitlines()
    rows = [line for line in lines if line.startswith("| `") and " - `" in line]
    for (name, rival), row in zip(PAIRS, rows, strict=True):
        against = told["variants"][name]["against"][rival]
        cells = [
            f"{d['difference']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]"
            for d in (against["all"]["auc"], against["novel"]["auc"])
        ]
        assert row.startswith(f"| `{name}` - `{rival}` | {cells[0]} | {cells[1]} | - | - | ")
    assert lines[-1] == f"- {told['notes'][-1]}"
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    path = write_result("deep_half", "python -m it", told, page=page(told))
    text = path.with_suffix(".md").read_text()
    assert text.startswith("# deep_half, ")
    assert page(told) in text
    assert "| Figure | Value |" not in text
