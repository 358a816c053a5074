"""Quality of BAHE against the full text: one budget for both, and what the difference is."""

import json
from dataclasses import replace

import pytest

from benchmarks.bench_full_text_quality import (
    FULL_TEXT,
    SAME_STEPS,
    compare,
    page,
    planned,
)
from benchmarks.quality_plan import SAME_BUDGET, once
from tests.training.world import make_world
from training.config import BaheConfig, FullTextConfig
from training.recipes import RECIPES


def test_all_have_one_budget_and_the_same_numbers_and_are_never_served():
    plan = planned(1.0)
    (bahe, _), (small_batches, _), (whole, _) = (runs[0] for runs in plan.values())
    assert list(plan) == [SAME_BUDGET, SAME_STEPS, FULL_TEXT]
    assert len({run for [(_, run)] in plan.values()}) == 3
    for recipe in (bahe, small_batches, whole):
        assert recipe.training.epochs == 1
        assert not recipe.training.extra_requests
        assert recipe.baseline
    assert isinstance(bahe.model, BaheConfig)
    assert bahe == replace(
        RECIPES["bahe_base"](),
        training=replace(RECIPES["bahe_base"]().training, epochs=1, extra_requests=False),
        baseline=True,
    )
    batch = whole.training.batch_contexts
    assert batch < bahe.training.batch_contexts
    assert small_batches == replace(bahe, training=replace(bahe.training, batch_contexts=batch))
    assert isinstance(whole.model, FullTextConfig)
    assert whole.model == replace(FullTextConfig(), use_numeric=True)


def test_a_share_is_the_same_for_all_and_has_runs_of_its_own():
    whole, part = planned(1.0), planned(0.25)
    for name, [(recipe, run)] in part.items():
        [(all_of_it, first)] = whole[name]
        assert run != first
        assert recipe.training == replace(all_of_it.training, context_share=0.25)
        assert recipe.model == all_of_it.model


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict:
    """Quick models; what is compared is named by the plan."""
    world = make_world(tmp_path_factory.mktemp("full_text") / "home", num_users=24)
    names = ("dcn_v2", "mean_pooling", "item_only")
    return compare(world.sources, {name: [once(RECIPES[name](), name)] for name in names}, 1)


def test_differences_are_those_to_the_last_model(told):
    *others, rival = told["models"].items()
    assert told["rival"] == rival[0] == "item_only"
    assert list(told["differences"]) == [name for name, _ in others] == ["dcn_v2", "mean_pooling"]
    for name, model in others:
        for figure in ("auc", "logloss"):
            values = told["differences"][name]["all"][figure]
            assert values["difference"] == pytest.approx(model[figure] - rival[1][figure])
            assert values["low"] <= values["difference"] <= values["high"]
        assert told["differences"][name]["all"]["auc"]["difference"] != 0
    assert json.loads(json.dumps(told)) == told


def test_the_page_has_all_models_and_their_differences(told):
    lines = page(told).splitlines()
    for name, by_slice in told["differences"].items():
        auc = by_slice["all"]["auc"]
        cell = f"{auc['difference']:+.4f} [{auc['low']:+.4f}, {auc['high']:+.4f}]"
        assert [line for line in lines if line.startswith(f"| `{name}` - `item_only` | {cell} |")]
    assert "learned from all given training requests" in lines[0]
    steps = told["training"]["dcn_v2"]["num_steps"]
    assert steps > 1
    assert f"`dcn_v2` in {steps:,} steps of 64 contexts" in lines[0]
    quarter = {name: one | {"context_share": 0.25} for name, one in told["training"].items()}
    assert "learned from 25% of the given training requests" in page(told | {"training": quarter})
    for name, values in told["models"].items():
        cell = f"{values['auc']:.4f} [{values['auc_low']:.3f}, {values['auc_high']:.3f}]"
        assert [line for line in lines if line.startswith(f"| `{name}` | {cell} |")]
