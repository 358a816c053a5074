"""Tuning brings together what goes together, sees nothing of the future, and survives a kill."""

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from encoders.cli import commands
from encoders.config import EncoderConfig, TuningConfig
from encoders.encode import encode_behaviors
from encoders.fingerprint import describe_encoder
from encoders.pretrained import load_model
from encoders.text_encoder import TextEncoder
from encoders.tuning import MANIFEST_FILE, TuningManifest, tune
from feature_repo.command import SentenceGroup, Settings
from feature_repo.errors import DataSetError, EncoderError
from feature_repo.home import Home
from tests.encoders.planted import GROUPS, START, TEXTS, UNTIL, VALID, make_home, planted


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "home", planted(START, 75, seed=0), {"train": UNTIL})


def small(model: Path, **changes: Any) -> TuningConfig:
    config = TuningConfig(
        encoder=EncoderConfig(model=str(model), max_tokens=16),
        steps=12,
        batch_texts=12,
        group_texts=5,
        learning_rate=3e-3,
        dtype="float32",
        checkpoint_steps=4,
    )
    return replace(config, **changes)


def gap_between_groups(model: Path) -> float:
    """Mean cosine within a group less the mean cosine across, as ``encode`` gives the vectors."""
    config = EncoderConfig(model=str(model), max_tokens=16)
    vectors = TextEncoder.load(describe_encoder(config)).encode(TEXTS)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = units @ units.T
    same = np.kron(np.eye(2), np.ones((8, 8))).astype(bool)
    within = cosines[same & ~np.eye(16, dtype=bool)].mean()
    return float(within - cosines[~same].mean())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return tensors


def assert_equal_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("model", "recipe"), [("bert", "co_occurrence"), ("llama", "next_behavior")]
)
def test_planted_groups_come_together_and_encode_takes_the_folder(
    model: str, recipe: str, home: Home, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model_folder: Path = request.getfixturevalue(f"{model}_folder")
    folder = tmp_path / "made" / "tuned"
    before = gap_between_groups(model_folder)
    summary = tune(home, small(model_folder, recipe=recipe, steps=40), folder, until=UNTIL)
    assert gap_between_groups(folder) > before + 0.5
    held_out = summary.manifest.held_out
    assert held_out.num_pairs > 50
    assert held_out.before is not None
    assert held_out.after is not None
    assert held_out.after > held_out.before
    assert summary.manifest.losses[-1] < -0.3 < summary.manifest.losses[0]

    saved = TuningManifest.load(folder / MANIFEST_FILE, made_by="longtrail tune")
    assert saved == summary.manifest
    assert (saved.split_layer, saved.recipe, saved.until) == (2, recipe, UNTIL)
    assert (saved.steps, len(saved.losses), saved.num_texts) == (40, 40, 16)
    assert saved.seen_labels == {}
    assert [path.name for path in folder.parent.iterdir()] == ["tuned"]

    plain = encode_behaviors(home, EncoderConfig(model=str(model_folder), max_tokens=16)).manifest
    tuned = encode_behaviors(home, EncoderConfig(model=str(folder), max_tokens=16)).manifest
    assert plain.fingerprint != tuned.fingerprint
    # What it was made from is no part of what it is.
    (folder / MANIFEST_FILE).unlink()
    again = describe_encoder(EncoderConfig(model=str(folder), max_tokens=16))
    assert again.fingerprint == tuned.fingerprint


def test_later_events_change_nothing(bert_folder: Path, tmp_path: Path) -> None:
    events = planted(START, 60, seed=0)
    future = [*planted(UNTIL, 30, seed=1), ("user0", UNTIL, "word70"), ("user9", UNTIL, TEXTS[0])]
    config = small(bert_folder)
    for name, rows in (("past", events), ("all", [*future, *events])):
        tune(make_home(tmp_path / name, rows, {}), config, tmp_path / f"{name}-model", until=UNTIL)
    assert_equal_weights(tmp_path / "past-model", tmp_path / "all-model")
    # And what does change is noticed: an event of the last moment that counts.
    last = ("user0", UNTIL - timedelta(microseconds=1), GROUPS[1][0])
    changed = make_home(tmp_path / "changed", [*events, last], {})
    tune(changed, config, tmp_path / "changed-model", until=UNTIL)
    with pytest.raises(AssertionError):
        assert_equal_weights(tmp_path / "past-model", tmp_path / "changed-model")


class Killed(BaseException):
    """Stands for a signal: nothing but the files remains."""


@pytest.mark.parametrize(("killed_at", "model"), [(2, "bert"), (7, "llama")])
def test_a_killed_run_goes_on_to_the_same_weights(
    killed_at: int, model: str, home: Home, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = small(request.getfixturevalue(f"{model}_folder"), dtype="bfloat16")
    tune(home, config, tmp_path / "undisturbed", until=UNTIL)
    done: list[int] = []

    def kill(advance: int, total: int, **figures: float) -> None:
        done.append(advance)
        if sum(done) == killed_at:
            raise Killed

    folder = tmp_path / "resumed"
    with pytest.raises(Killed):
        tune(home, config, folder, until=UNTIL, progress=kill)
    assert not folder.exists()
    kept = tmp_path / "resumed.checkpoint.part"
    assert kept.exists() == (killed_at > config.checkpoint_steps)
    if kept.exists():
        with pytest.raises(EncoderError, match="begun with other settings or data: give another"):
            tune(home, replace(config, seed=1), folder, until=UNTIL)
    summary = tune(home, config, folder, until=UNTIL)
    assert summary.steps_resumed == killed_at // config.checkpoint_steps * config.checkpoint_steps
    assert len(summary.manifest.losses) == config.steps
    assert_equal_weights(tmp_path / "undisturbed", folder)
    assert not kept.exists()


def test_the_final_weight_decides_which_layers_move(
    home: Home, model_folder: Path, tmp_path: Path
) -> None:
    before = {name: t.clone() for name, t in load_model(str(model_folder)).named_parameters()}
    moved: dict[float, set[str]] = {}
    for weight in (0.0, 0.5):
        config = small(model_folder, steps=1, final_weight=weight)
        folder = tmp_path / str(weight)
        tune(home, config, folder, until=UNTIL)
        after = dict(load_model(str(folder)).named_parameters())
        moved[weight] = {
            f"layer {part}"
            for name, tensor in after.items()
            if "pooler" not in name and not torch.equal(tensor, before[name])
            for part in name.split(".")
            if part.isdigit()
        }
    assert moved == {
        0.0: {"layer 0", "layer 1"},
        0.5: {"layer 0", "layer 1", "layer 2", "layer 3"},
    }


def test_groups_change_nothing_but_memory(home: Home, llama_folder: Path, tmp_path: Path) -> None:
    for size in (3, 12):
        config = small(llama_folder, steps=2, group_texts=size)
        tune(home, config, tmp_path / str(size), until=UNTIL)
    first, second = weights(tmp_path / "3"), weights(tmp_path / "12")
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-4)


def test_sentences(home: Home, bert_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(EncoderError, match="there exists already: give another folder"):
        tune(home, small(bert_folder), tmp_path / "there")
    with pytest.raises(DataSetError, match="no events before 2024-01-01"):
        tune(home, small(bert_folder), tmp_path / "new", until=START)
    encoder = EncoderConfig(model=str(bert_folder), split_layer=5)
    with pytest.raises(EncoderError, match=r"split layer must be in \[1, 4\]"):
        tune(home, small(bert_folder, encoder=encoder), tmp_path / "new", until=UNTIL)
    with pytest.raises(ValueError, match="until must say its time zone, got 2024-03-01T00:00:00"):
        tune(home, small(bert_folder), tmp_path / "new", until=UNTIL.replace(tzinfo=None))
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    (flat / "model.safetensors").touch()
    with pytest.raises(EncoderError, match="only models that are one stack of layers"):
        tune(home, small(flat), tmp_path / "new", until=UNTIL)
    with pytest.raises(
        EncoderError, match=r"the loss became nan in step \d+: lower --learning-rate"
    ):
        tune(home, small(bert_folder, learning_rate=1e30), tmp_path / "new", until=UNTIL)
    assert {path.name for path in tmp_path.iterdir()} == {"home", "there", "flat"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"recipe": "magic"}, "recipe must be one of co_occurrence, next_behavior, got 'magic'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_texts": 1}, "batch_texts must be at least 2, got 1"),
        ({"final_weight": -0.5}, "final_weight must be at least 0, got -0.5"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ],
)
def test_the_configuration_is_checked(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EncoderError, match=sentence):
        TuningConfig(**change)


def run_command(home: Home, *arguments: str) -> Any:
    group = SentenceGroup(commands=commands)
    return CliRunner().invoke(
        group, ["tune", "--threads", "1", *arguments], obj=Settings(home, "embedded")
    )


def test_the_command_prints_one_line(home: Home, bert_folder: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "tuned")
    arguments = [
        *("--model", str(bert_folder), "--max-tokens", "16", "--until", "2024-03-02"),
        *("--steps", "2", "--batch-texts", "8", "--seed", "3", folder),
    ]
    result = run_command(home, *arguments)
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout)
    assert line["folder"] == folder
    assert (line["split_layer"], line["recipe"], line["steps"]) == (2, "co_occurrence", 2)
    assert line["until"] == "2024-03-02T00:00:00+00:00"
    assert 0 < line["held_out_auc_before"] < 1
    assert 0 < line["held_out_auc_after"] < 1
    assert line["seen_labels"] == {"train": 1}
    assert "Note: 1 train impressions are older than 2024-03-02T00:00:00+00:00" in result.stderr

    assert f"Next: longtrail encode --model {folder} --split-layer 2" in result.stderr

    again = run_command(home, *arguments)
    assert again.exit_code == 1
    assert again.stderr.startswith(f"Error: {folder} exists already: give another folder")


def test_the_command_falls_back_where_little_lies_before_training(
    home: Home, bert_folder: Path, tmp_path: Path
) -> None:
    result = run_command(
        home,
        *("--model", str(bert_folder), "--max-tokens", "16"),
        *("--steps", "1", "--batch-texts", "8", str(tmp_path / "tuned")),
    )
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout)
    assert line["until"] == VALID.isoformat()
    assert line["seen_labels"] == {"train": 1}
    assert (line["held_out_pairs"], line["held_out_auc_after"]) == (0, None)
