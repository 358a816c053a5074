"""Quality of BAHE against the full text: one budget for both, and what the difference is."""

import json
from dataclasses import replace

import pytest

from benchmarks.bench_full_text_quality import FULL_TEXT, compare, page, planned
from benchmarks.quality_plan import SAME_BUDGET, once
from tests.training.world import make_world
from training.config import BaheConfig, FullTextConfig
from training.recipes import RECIPES


def test_both_have_one_budget_and_the_same_numbers_and_are_never_served():
    plan = planned(1.0)
    [(bahe, bahe_run)], [(whole, whole_run)] = plan[SAME_BUDGET], plan[FULL_TEXT]
    assert bahe_run != whole_run
    for recipe in (bahe, whole):
        assert recipe.training.epochs == 1
        assert not recipe.training.extra_requests
        assert recipe.baseline
    assert isinstance(bahe.model, BaheConfig)
    assert bahe == replace(
        RECIPES["bahe_base"](),
        training=replace(RECIPES["bahe_base"]().training, epochs=1, extra_requests=False),
        baseline=True,
    )
    assert isinstance(whole.model, FullTextConfig)
    assert whole.model == replace(FullTextConfig(), use_numeric=True)


def test_a_share_is_the_same_for_both_and_has_runs_of_its_own():
    whole, part = planned(1.0), planned(0.25)
    for name, [(recipe, run)] in part.items():
        [(all_of_it, first)] = whole[name]
        assert run != first
        assert recipe.training == replace(all_of_it.training, context_share=0.25)
        assert recipe.model == all_of_it.model


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict:
    """Two quick models; what is compared is named by the plan."""
    world = make_world(tmp_path_factory.mktemp("full_text") / "home", num_users=24)
    names = ("dcn_v2", "popularity")
    return compare(world.sources, {name: [once(RECIPES[name](), name)] for name in names}, 1)


def test_the_difference_is_the_first_models_less_the_seconds(told):
    assert told["compared"] == ["dcn_v2", "popularity"] == list(told["models"])
    first, second = told["models"].values()
    for figure in ("auc", "logloss"):
        values = told["by_slice"]["all"][figure]
        assert values["difference"] == pytest.approx(first[figure] - second[figure])
        assert values["low"] <= values["difference"] <= values["high"]
    assert told["by_slice"]["all"]["auc"]["difference"] != 0
    assert json.loads(json.dumps(told)) == told


def test_the_page_has_both_models_and_their_difference(told):
    lines = page(told).splitlines()
    auc = told["by_slice"]["all"]["auc"]
    cell = f"{auc['difference']:+.4f} [{auc['low']:+.4f}, {auc['high']:+.4f}]"
    assert [line for line in lines if line.startswith(f"| `dcn_v2` - `popularity` | {cell} |")]
    assert "learned from all given training requests" in lines[0]
    part = told | {"context_shares": dict.fromkeys(told["models"], 0.25)}
    assert "learned from 25% of the given training requests" in page(part)
    for name, values in told["models"].items():
        cell = f"{values['auc']:.4f} [{values['auc_low']:.3f}, {values['auc_high']:.3f}]"
        assert [line for line in lines if line.startswith(f"| `{name}` | {cell} |")]
