"""The training benchmark: our steps learn, turns are counted, a missing FuxiCTR is said."""

import importlib.util
import json
import os
from pathlib import Path
from statistics import median

import click
import pytest
import torch
from click.testing import CliRunner
from torch._inductor.runtime.cache_dir_utils import cache_dir

from benchmarks import results_file
from benchmarks.bench_training import (
    compare,
    compile_all,
    contenders,
    fresh_compile_cache,
    main,
    measure,
    page,
)
from benchmarks.training_steps import OURS, Sizes, fuxictr_step, our_step
from training.recipes import RECIPES

SIZES = Sizes(num_rows=16, length=5, num_items=20, vector_width=12)


@pytest.mark.parametrize("kind", list(OURS))
@pytest.mark.parametrize("num_candidates", [1, 4])
def test_our_steps_lower_the_loss_of_their_batch(kind, num_candidates):
    step = our_step(SIZES, OURS[kind], num_candidates=num_candidates)
    losses = [step() for _ in range(40)]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.01


def test_bahe_is_measured_as_its_recipes_train_it():
    for name in ("bahe_base", "bahe_fast"):
        config = OURS[name]
        assert config == RECIPES[name]().model
        assert config.use_deep_half
        assert config.fine_tune == "full"
    assert OURS["bahe_base"].use_target_attention
    assert OURS["bahe_base"].use_text_evidence


@pytest.mark.parametrize("kind", list(OURS))
def test_a_compiled_step_learns_the_same(kind):
    """As torch.compile would be given it; compiling itself needs a C++ compiler."""
    losses = []
    with torch.compiler.set_stance("force_eager"):
        for compiled in (False, True):
            step = our_step(SIZES, OURS[kind], num_candidates=4, compiled=compiled)
            torch.manual_seed(0)
            losses.append([step() for _ in range(5)])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 5


def test_the_first_step_of_what_is_compiled_is_timed():
    taken: list[str] = []
    steps = {name: (lambda name=name: taken.append(name)) for name in ("ours_a", "compiled_ours_a")}
    seconds = compile_all(steps)
    assert taken == ["compiled_ours_a"]
    assert list(seconds) == ["ours_a"]
    assert seconds["ours_a"] >= 0


def test_turns_are_taken_by_all_and_the_first_is_not_counted():
    taken: list[str] = []
    steps = {name: (lambda name=name: taken.append(name)) for name in ("a", "b")}
    rates = measure(steps, 10, num_rounds=3, steps_per_turn=2)
    assert "".join(taken) == "aabb" * 4
    assert {name: len(values) for name, values in rates.items()} == {"a": 3, "b": 3}


RATES = {
    "fuxictr_ids": [10.0, 20.0],
    "fuxictr_texts": [4.0, 4.0],
    "ours_ids_1": [20.0, 20.0],
    "compiled_ours_ids_1": [30.0, 40.0],
    "ours_bahe_base_4": [2.0, 6.0],
}


def test_ratios_are_of_turns_of_the_same_round():
    found = compare(RATES)
    assert found["rows_per_s"] == {
        name: median(values) for name, values in RATES.items() if "compiled" not in name
    }
    assert found["rows_per_s_compiled"] == {"ours_ids_1": 35.0}
    assert found["ours_to_fuxictr"] == {
        "ids_1": {"median": 1.5, "lowest": 1.0, "highest": 2.0},
        "bahe_base_4": {"median": 1.0, "lowest": 0.5, "highest": 1.5},  # texts, too
    }
    assert found["compiled_to_eager"] == {"ids_1": {"median": 1.75, "lowest": 1.5, "highest": 2.0}}
    alone = compare({"ours_ids_1": [1.0]})
    assert (alone["ours_to_fuxictr"], alone["compiled_to_eager"]) == ({}, {})


def test_the_page_has_a_row_for_every_step():
    sizes = {"batch": 1024, "length": 50, "threads": 1, "load_average_1min": 0.5}
    lines = page({**sizes, **compare(RATES), "compile_s": {"ours_ids_1": 9.6}}).splitlines()
    assert lines[-4:] == [
        "| `fuxictr_ids` | 15 | - | - | - | - |",
        "| `fuxictr_texts` | 4 | - | - | - | - |",
        "| `ours_ids_1` | 20 | 1.50 [1.00, 2.00] | 35 | 1.75 [1.50, 2.00] | 10 |",
        "| `ours_bahe_base_4` | 4 | 1.00 [0.50, 1.50] | - | - | - |",
    ]


@pytest.mark.parametrize("chosen", [(), ("texts", "bahe_fast")], ids=["all", "some"])
def test_the_command_writes_every_step_of_ours(tmp_path, monkeypatch, chosen):
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    sizes = ["--batch", "8", "--length", "4", "--items", "9", "--width", "12"]
    turns = ["--candidates", "2", "--rounds", "1", "--steps-per-turn", "1"]
    models = [word for kind in chosen for word in ("--model", kind)]
    ran = CliRunner().invoke(main, [*sizes, *turns, *models, "--ours-only", "--no-compile"])
    assert ran.exit_code == 0, ran.output
    found = json.loads(Path(json.loads(ran.stdout)["result"]).read_text())
    kinds = chosen or OURS
    assert list(found["rows_per_s"]) == [f"ours_{kind}_{n}" for kind in kinds for n in (1, 2)]
    assert found["compile_s"] == {}


def test_each_model_is_compiled_once():
    found = contenders(
        SIZES, ("ids", "bahe_fast"), num_candidates=4, with_fuxictr=False, with_compiled=True
    )
    assert list(found) == [
        *("ours_ids_1", "ours_ids_4", "compiled_ours_ids_4"),
        *("ours_bahe_fast_1", "ours_bahe_fast_4", "compiled_ours_bahe_fast_4"),
    ]


@pytest.mark.parametrize("before", [None, "/kept"])
def test_what_was_compiled_before_is_out_of_sight(monkeypatch, before):
    name = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    with fresh_compile_cache():
        folder = Path(cache_dir())
        assert folder != Path("/kept")
        assert not list(folder.iterdir())
    assert not folder.exists()
    assert os.environ.get(name) == before


def test_compiling_without_a_compiler_is_said_before_it_begins(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    taken: list[str] = []
    with pytest.raises(click.ClickException, match=r"install g\+\+, or pass --no-compile"):
        compile_all({"compiled_ours_ids_1": lambda: taken.append("step") or 0.0})
    assert not taken
    assert compile_all({"ours_ids_1": lambda: taken.append("step") or 0.0}) == {}


def test_fuxictr_learns_or_its_absence_is_said():
    if importlib.util.find_spec("fuxictr") is None:
        with pytest.raises(click.ClickException, match="pip install fuxictr"):
            fuxictr_step(SIZES, texts=False)
    else:
        step = fuxictr_step(SIZES, texts=False)
        losses = [step() for _ in range(40)]
        assert losses[-1] < losses[0]
