"""The quality benchmark: what is trained and compared, stale runs, and what the tables say."""

import json
import re
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from benchmarks import results_file
from benchmarks.quality_page import page
from benchmarks.quality_plan import (
    GIVEN,
    LIGHTGBM,
    SINGLE,
    TOGETHER,
    TREES,
    compared_models,
    planned,
    train_missing,
    why_not_loaded,
)
from benchmarks.quality_result import SLICES, compared, figures, result
from benchmarks.results_file import given_command, write_result
from feature_repo.artifact import MANIFEST_FILE
from feature_repo.errors import ArtifactError
from tests.training.world import make_world
from training.ablations import FULL, plan_variants
from training.evaluate import Evaluation, ScoredRows, measure
from training.recipes import RECIPES
from training.sources import Sources

NUM_USERS, ROWS_PER_USER = 40, 10
QUALITY = {TREES: 0.5, LIGHTGBM: 0.6, SINGLE: 1.2, TOGETHER: 1.5}
"""Model -> how far its scores of clicked rows lie above those of others, in deviations."""
NEW = "bahe_fast"
"""A model that nothing is compared with."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Sources:
    """A home whose impressions were sampled, as those of the benchmark's data set."""
    world = make_world(tmp_path_factory.mktemp("quality") / "home", num_users=24)
    manifest = world.sources.manifest.model_copy(update={"impressions": "sampled"})
    return replace(world.sources, manifest=manifest)


# What is trained.
@pytest.mark.parametrize("lightgbm", [True, False])
def test_the_plan_names_every_model_and_run_once(sources, lightgbm):
    plan = planned(sources, num_seeds=3, lightgbm=lightgbm)
    rival = LIGHTGBM if lightgbm else TREES
    assert {TREES, SINGLE, TOGETHER, SINGLE + GIVEN, rival + GIVEN} <= plan.keys()
    assert (LIGHTGBM in plan) == lightgbm
    assert list(plan) == list(planned(sources, num_seeds=1, lightgbm=lightgbm))
    runs = [run for seeded in plan.values() for _, run in seeded]
    assert len(set(runs)) == len(runs) == len(plan) + 2
    recipes = [recipe for seeded in plan.values() for recipe, _ in seeded]
    assert all(recipe.baseline for recipe in recipes)  # none becomes the one that is served
    assert [recipe.training.seed for recipe, _ in plan[SINGLE]] == [0, 1, 2]
    variants, _ = plan_variants(sources, RECIPES[SINGLE](), num_seeds=3)
    assert plan[SINGLE] == variants[0].seeded()  # the ablations find them


def test_models_on_the_given_rows_see_no_others(sources):
    plan = planned(sources, num_seeds=1, lightgbm=True)
    alone = {SINGLE + GIVEN, LIGHTGBM + GIVEN}
    found = {name for name, [(recipe, _)] in plan.items() if not recipe.training.extra_requests}
    assert found == alone
    logged = replace(
        sources, manifest=sources.manifest.model_copy(update={"impressions": "logged"})
    )
    without = planned(logged, num_seeds=1, lightgbm=True)
    assert plan.keys() - without.keys() == alone


def test_the_pairs_are_those_of_models_that_are_there():
    models = [TREES, LIGHTGBM, SINGLE, TOGETHER, SINGLE + GIVEN, LIGHTGBM + GIVEN]
    expected = [
        (SINGLE, LIGHTGBM),
        (SINGLE, TREES),
        (TOGETHER, LIGHTGBM),
        (TOGETHER, TREES),
        (SINGLE + GIVEN, LIGHTGBM + GIVEN),
        (SINGLE, SINGLE + GIVEN),
        (LIGHTGBM, LIGHTGBM + GIVEN),
    ]
    assert list(compared_models(models)) == expected
    assert list(compared_models([TREES, SINGLE, TOGETHER])) == [(SINGLE, TREES), (TOGETHER, TREES)]


def test_a_package_that_cannot_be_loaded_says_why():
    assert why_not_loaded("json") is None
    assert why_not_loaded("no_such_package") == "No module named 'no_such_package'"


def test_runs_are_trained_once_and_stale_ones_are_refused(sources):
    popularity = replace(RECIPES["popularity"](), baseline=True)
    count = replace(RECIPES["repeat_count"](), baseline=True)
    train_missing(sources, [(popularity, "quality-popularity")], threads=1)
    first = sources.home.runs / "quality-popularity" / MANIFEST_FILE
    before = first.stat().st_mtime_ns
    train_missing(
        sources, [(popularity, "quality-popularity"), (count, "quality-count")], threads=1
    )
    assert first.stat().st_mtime_ns == before
    assert (sources.home.runs / "quality-count" / MANIFEST_FILE).is_file()
    assert not sources.home.current_run.exists()
    stale = r"run 'quality-popularity' was trained with other settings, data or vectors: delete"
    longer = replace(popularity, sequence_length=2)
    other = sources.manifest.model_copy(update={"source_fingerprint": "other"})
    for asked, recipe in ((sources, longer), (replace(sources, manifest=other), popularity)):
        with pytest.raises(ArtifactError, match=stale):
            train_missing(
                asked, [(count, "quality-new"), (recipe, "quality-popularity")], threads=1
            )
    assert not (sources.home.runs / "quality-new").exists()  # nothing is trained in vain


# What is told.
def scored(models: dict[str, float]) -> ScoredRows:
    """Rows on which every model is as good as it is said to be; three runs of :data:`SINGLE`."""
    generator = np.random.default_rng(0)
    num_rows = NUM_USERS * ROWS_PER_USER
    labels = generator.integers(0, 2, num_rows)
    users = np.arange(num_rows) // ROWS_PER_USER
    noise = generator.normal(size=num_rows)
    return ScoredRows(
        rows="test",
        labels=labels,
        users=users,
        masks={
            "novel": users < NUM_USERS // 2,
            "cold_items": np.zeros(num_rows, bool),
            "history_0": users % 3 == 0,
        },
        manifests={},
        logits={
            run: (noise + quality * (labels - 0.5) + 0.1 * seed * labels).astype(np.float32)
            for name, quality in models.items()
            for seed, run in enumerate(runs_of(name))
        },
        notes=[],
    )


def runs_of(name: str) -> list[str]:
    return [f"{name}-{seed}" for seed in range(3 if name == SINGLE else 1)]


def found(models: dict[str, float]) -> tuple[dict, dict[str, Evaluation]]:
    rows = scored(models)
    evaluations = {name: measure(rows, runs_of(name), started=0.0) for name in models}
    pairs = {
        (name, rival): measure(rows, runs_of(name), against=runs_of(rival), started=0.0)
        for name, rival in compared_models(models)
    }
    ablations = {
        FULL: evaluations[SINGLE],
        "without-text": measure(rows, runs_of(TREES), against=runs_of(SINGLE), started=0.0),
    }
    return result(evaluations, pairs, ablations), evaluations


ALL = QUALITY | {SINGLE + GIVEN: 0.8, LIGHTGBM + GIVEN: 0.7, NEW: 0.3}


@pytest.fixture(scope="module")
def whole() -> tuple[dict, dict[str, Evaluation]]:
    return found(ALL)


def test_the_comparison_is_of_the_best_single_model_and_its_rival(whole):
    told, evaluations = whole
    comparison = told["comparison"]
    best, rival = (evaluations[name].metrics["auc"] for name in (SINGLE, LIGHTGBM))
    assert comparison["best_auc"] == best > rival == comparison["lightgbm_auc"]
    assert comparison["difference"] == pytest.approx(best - rival)
    assert 0 < comparison["low"] < comparison["difference"] < comparison["high"]
    assert comparison["trees"] == LIGHTGBM
    assert json.loads(json.dumps(told)) == told


@pytest.mark.parametrize(
    ("where", "first", "second"),
    [
        (("comparison", "by_slice"), SINGLE, LIGHTGBM),
        (("comparison", "against_trees"), SINGLE, TREES),
        (("downstream", "by_slice"), TOGETHER, LIGHTGBM),
        (("downstream", "against_trees"), TOGETHER, TREES),
        (("given_rows", "by_slice"), SINGLE + GIVEN, LIGHTGBM + GIVEN),
        (("extra_rows", SINGLE), SINGLE, SINGLE + GIVEN),
        (("extra_rows", LIGHTGBM), LIGHTGBM, LIGHTGBM + GIVEN),
    ],
)
def test_every_difference_is_of_the_models_that_it_names(whole, where, first, second):
    told, evaluations = whole
    differences = told[where[0]][where[1]]
    assert differences.keys() == {"all", "novel", "cold_items", "history_0"}
    for figure in ("auc", "gauc", "logloss"):
        one, other = (evaluations[name].metrics[figure] for name in (first, second))
        assert differences["all"][figure]["difference"] == pytest.approx(one - other)
        one, other = (evaluations[name].slices["novel"][figure] for name in (first, second))
        assert differences["novel"][figure]["difference"] == pytest.approx(one - other)
    assert differences["cold_items"]["auc"] == {"difference": None, "low": None, "high": None}


def test_figures_keep_every_interval_of_all_rows_and_slices(whole):
    told, evaluations = whole
    assert list(told["models"]) == list(ALL)
    for values in (told["models"][SINGLE], told["models"][SINGLE]["slices"]["novel"]):
        for figure in ("auc", "gauc", "logloss"):
            assert values[f"{figure}_low"] < values[figure] < values[f"{figure}_high"]
        assert values["num_rows"] > 0
        assert 0 < values["calibration_error"] < values["ne"]
    assert told["models"][SINGLE]["runs"] == runs_of(SINGLE)
    assert told["models"][NEW] == figures(evaluations[NEW])
    text = told["ablations"]["without-text"]["against_full"]["all"]["auc"]
    assert text["difference"] == pytest.approx(
        evaluations[TREES].metrics["auc"] - evaluations[SINGLE].metrics["auc"]
    )
    assert told["ablations"][FULL]["against_full"] == {}


def tables(told: dict) -> list[list[list[str]]]:
    """The cells of the page's tables, head first, without the line below it."""
    lines = page(PAGE | told).splitlines()
    found: list[list[list[str]]] = []
    for before, line in pairwise(["", *lines]):
        if line.startswith("| "):
            found += [[]] if not before.startswith("|") else []
            found[-1].append(line.strip("| ").split(" | "))
    return [[cells for cells in rows if set("".join(cells)) != {"-"}] for rows in found]


PAGE = {"dataset": "small", "rows": "test", "encoder": "0f", "num_seeds": 3, "notes": ["a", "b"]}
"""What the benchmark adds to a result."""
INTERVAL = r"[+-]?\d\.\d{4} \[[+-]?\d\.\d{3,4}, [+-]?\d\.\d{3,4}\]"


def test_every_figure_of_the_table_of_models_has_its_interval(whole):
    told, _ = whole
    head, *rows = tables(told)[0]
    assert head == [
        "Model",
        *(
            f"{figure} [95 %]"
            for figure in ("AUC", "GAUC", "logloss", "AUC, novel", "AUC, cold items")
        ),
    ]
    assert [cells[0].strip("*`") for cells in rows] == list(ALL)
    for name, cells in zip(ALL, rows, strict=True):
        values = told["models"][name]
        assert (cells[0] == f"**`{name}`**") == (name in (SINGLE, TOGETHER))
        assert cells[1].startswith("**") == cells[0].startswith("**")
        for cell in cells[1:5]:
            assert re.fullmatch(INTERVAL, cell.replace("*", "")), cell
        assert cells[5] == "-"  # there are no such rows
        for cell, of, figure in (
            (cells[2], values, "gauc"),
            (cells[3], values, "logloss"),
            (cells[4], values["slices"]["novel"], "auc"),
        ):
            low, high = of[f"{figure}_low"], of[f"{figure}_high"]
            assert cell == f"{of[figure]:.4f} [{low:.3f}, {high:.3f}]"


def test_the_table_of_differences_has_a_row_for_every_pair_and_ablation(whole):
    told, _ = whole
    _, (head, *rows), (other_head, *other_rows) = tables(told)
    assert len(head) == 4 + len(SLICES)
    labels = {f"`{name}` - `{rival}`" for name, rival in compared_models(ALL)}
    assert {cells[0] for cells in rows} == labels | {f"`{SINGLE}` without text - whole"}
    assert [cells[0] for cells in rows] == [cells[0] for cells in other_rows]
    assert rows[0][0] == f"`{SINGLE}` - `{LIGHTGBM}`"
    by_slice = told["comparison"]["by_slice"]
    expected = [by_slice["all"]["auc"], by_slice["novel"]["auc"], None, None]
    for cell, values in zip(
        rows[0][1:],
        [*expected, by_slice["all"]["gauc"], by_slice["all"]["logloss"]],
        strict=True,
    ):
        if values is None:
            assert cell == "-"
        else:
            low, high = values["low"], values["high"]
            assert cell == f"{values['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
    assert other_head[1:] == ["AUC, history 0"]
    for cells in other_rows:
        assert re.fullmatch(INTERVAL, cells[1])


def test_a_result_without_ablations_has_its_tables(whole):
    told, _ = whole
    _, (_, *rows), _ = tables(told | {"ablations": {}})
    labels = [cells[0] for cells in rows]
    assert len(labels) == len(list(compared_models(ALL)))
    assert not [label for label in labels if "whole" in label]


def test_a_result_of_before_an_interval_was_kept_shows_the_figure_alone(whole):
    told, _ = whole
    models = {
        name: {key: value for key, value in values.items() if not key.startswith("gauc_")}
        for name, values in told["models"].items()
    }
    older = {key: value for key, value in told.items() if key not in ("given_rows", "extra_rows")}
    for key in ("comparison", "downstream"):
        older[key] = {k: value for k, value in told[key].items() if k != "against_trees"}
    (_, *rows), (_, *differences), _ = tables(older | {"models": models})
    assert [cells[2] for cells in rows] == [f"{v['gauc']:.4f}" for v in models.values()]
    assert not [cells for cells in differences if GIVEN in cells[0] or f"`{TREES}`" in cells[0]]


def test_the_result_file_holds_the_page(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    told = PAGE | whole[0]
    path = write_result("quality", "python -m it", told, page=page(told))
    assert json.loads(path.read_text())["models"] == told["models"]
    text = path.with_suffix(".md").read_text()
    assert text.startswith("# quality, ")
    assert text.endswith(page(told) + "\n")
    assert page(told).endswith("\n\n- a\n- b")
    write_result("quality", "python -m it", {"rows": 1.5})
    assert (
        path.with_suffix(".md")
        .read_text()
        .endswith("\n\n| Figure | Value |\n| --- | --- |\n| rows | 1.5 |\n")
    )


def test_without_lightgbm_the_other_trees_are_the_rival_and_are_told_once():
    told, evaluations = found({name: ALL[name] for name in (TREES, SINGLE, TOGETHER)})
    assert told["comparison"]["trees"] == TREES
    assert told["comparison"]["lightgbm_auc"] == evaluations[TREES].metrics["auc"]
    assert told["comparison"]["by_slice"] == told["comparison"]["against_trees"]
    assert (told["given_rows"], told["extra_rows"]) == ({}, {})
    labels = [cells[0] for cells in tables(told)[1]]
    assert labels.count(f"`{SINGLE}` - `{TREES}`") == 1


def test_differences_of_an_evaluation_without_another_side_are_none():
    rows = scored({TREES: 1.0})
    assert compared(measure(rows, runs_of(TREES), started=0.0)) == {}


def test_the_command_holds_the_options_that_were_given(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["anything", "--no-tuning", "--home", "my shop"])
    assert given_command("bench_quality") == (
        "python -m benchmarks.bench_quality --no-tuning --home 'my shop'"
    )
