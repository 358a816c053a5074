"""Tuning learns the tasks, survives a kill to the same bits, and merges its adapters."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from encoders.lm.evaluated import ANSWER_TOKENS
from encoders.lm.examples import Example, TaskConfig
from encoders.lm.generation import GenerationOptions, generate
from encoders.lm.instruction_tuning import (
    TUNING_FILE,
    InstructionTuningConfig,
    InstructionTuningManifest,
    tune_on_tasks,
)
from encoders.lm.model_folder import load_language_model
from encoders.lm.task_scores import score_tasks
from encoders.lm.tasks import build_examples
from feature_repo.errors import EncoderError
from feature_repo.home import Home
from tests.encoders.lm.planted_models import byte_tokenizer, save, small_model
from tests.encoders.lm.shop_home import TITLES, make_home

NUM_TOKENS = 300
TASKS = TaskConfig(
    test_share=0.2, max_train=40, max_valid=10, history_lines=2, user_baskets=2, num_neighbors=1
)
CONFIG = InstructionTuningConfig(
    tasks=TASKS,
    epochs=1,
    batch_rows=4,
    pass_rows=2,
    learning_rate=3e-3,
    precision="float32",
    checkpoint_steps=3,
    num_validations=2,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = make_home(tmp_path_factory.mktemp("shop"))
    tokenizer = byte_tokenizer(TITLES, num_tokens=NUM_TOKENS)
    save(small_model(NUM_TOKENS, length=256), tokenizer, home.models / "base")
    return home


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return tensors


def assert_equal_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_it_learns_what_can_be_learned(home: Home) -> None:
    """The shelf is the title's colour: told of items that were held out, after some epochs."""
    config = replace(CONFIG, epochs=12, learning_rate=1e-2)
    base = home.models / "base"
    summary = tune_on_tasks(home, base, "able", config)
    manifest = summary.manifest
    assert summary.folder == home.models / "able"
    assert InstructionTuningManifest.load(summary.folder / TUNING_FILE, made_by="") == manifest
    assert manifest.held_out_before is not None
    last = manifest.validations[-1]
    assert last.step == manifest.steps
    assert last.figures["answer_loss"] < 0.5 * manifest.held_out_before
    assert manifest.num_examples["attribute:shelf"] > 20
    held_out: list[Example] = [
        e
        for e in build_examples(home, TASKS)
        if e.split == "test" and e.task == "attribute:shelf" and not e.is_new
    ]
    found = {}
    for folder in (base, summary.folder):
        model, tokenizer = load_language_model(folder)
        answers = generate(
            model, tokenizer, [e.prompt for e in held_out], GenerationOptions(ANSWER_TOKENS)
        )
        found[folder.name] = score_tasks(held_out, answers)["attribute:shelf"].model.exact
    assert found["base"] == 0
    assert found["able"] > 0.8


class Killed(BaseException):
    """Stands for a signal: nothing but the files remains."""


@pytest.mark.parametrize("rank", [None, 2])
def test_a_killed_run_goes_on_to_the_same_weights(home: Home, rank: int | None) -> None:
    base, kind = home.models / "base", f"rank-{rank}"
    config = replace(CONFIG, lora_rank=rank)
    whole = tune_on_tasks(home, base, f"undisturbed-{kind}", config)
    done: list[int] = []

    def kill(advance: int, total: int, **figures: float) -> None:
        done.append(advance)
        if len(done) == 6:  # the first news is that of the beginning
            raise Killed

    with pytest.raises(Killed):
        tune_on_tasks(home, base, f"resumed-{kind}", config, progress=kill)
    assert not (home.models / f"resumed-{kind}").exists()
    with pytest.raises(EncoderError, match="begun with other settings or data"):
        tune_on_tasks(home, base, f"resumed-{kind}", replace(config, seed=1))
    summary = tune_on_tasks(home, base, f"resumed-{kind}", config)
    assert 0 < summary.steps_resumed < summary.manifest.steps
    assert_equal_weights(whole.folder, summary.folder)
    # Again there is nothing to do; with other settings the name is taken.
    assert tune_on_tasks(home, base, f"resumed-{kind}", config).manifest == summary.manifest
    with pytest.raises(EncoderError, match="there is another model 'resumed"):
        tune_on_tasks(home, base, f"resumed-{kind}", replace(config, epochs=2))
    assert not list(home.models.glob(f"resumed-{kind}.*"))


def test_adapters_move_linear_layers_alone_and_are_merged(home: Home) -> None:
    base = home.models / "base"
    folder = tune_on_tasks(home, base, "adapted", replace(CONFIG, lora_rank=2)).folder
    before, after = weights(base), weights(folder)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "_proj" in name}
    # Of rank 2: nothing is left of the change without its two largest directions.
    change = (
        after["model.layers.0.mlp.up_proj.weight"] - before["model.layers.0.mlp.up_proj.weight"]
    )
    values = torch.linalg.svdvals(change)
    assert values[1] > 1e-4
    assert values[2] < 1e-5 * values[0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"epochs": 0.0}, "epochs must be above 0, got 0.0"),
        ({"lora_rank": 0}, "lora_rank must be at least 1, got 0"),
        ({"batch_rows": 0}, "batch_rows must be at least 1, got 0"),
        ({"lora_rank": 2, "sharded": True}, "adapters are not shared out"),
    ],
)
def test_the_configuration_is_checked(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EncoderError, match=sentence):
        InstructionTuningConfig(**change)


def test_the_name_is_checked(home: Home) -> None:
    with pytest.raises(EncoderError, match="must be a plain file name, got 'a/b'"):
        tune_on_tasks(home, home.models / "base", "a/b", CONFIG)
    with pytest.raises(EncoderError, match="there is another model 'base'"):
        tune_on_tasks(home, home.models / "base", "base", CONFIG)
