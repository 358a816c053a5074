"""The loop's guards: leaps are skipped and stop it in the end, schedules end where they should."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from encoders.checkpoint import Checkpoint
from encoders.devices import Devices
from encoders.lm.learning_state import LearningState, snapshot_steps, validation_steps
from encoders.lm.loss import LanguageModelLoss
from encoders.lm.packing import PackedRows
from encoders.lm.pretrainer import Pretrainer
from encoders.lm.recipes import LearningConfig
from encoders.lm.snapshots import snapshots_in
from feature_repo.errors import EncoderError
from tests.encoders.lm.planted_models import small_model
from tests.encoders.lm.small_corpus import small


class Planted:
    """The same easy rows in every step; tokens that never come otherwise in the broken ones.

    Args:
        broken: Steps.
    """

    def __init__(self, *broken: int) -> None:
        self.broken = broken

    def batch(self, step: int) -> PackedRows:
        """Eight rows of 16 tokens."""
        inputs = torch.arange(16).repeat(8, 1)
        targets = inputs + 1
        if step in self.broken:
            inputs, targets = inputs + 100, inputs + 200
        return PackedRows(inputs, targets, torch.arange(16).repeat(8, 1))


def learning(**changes: Any) -> LearningConfig:
    return replace(small().learning, steps=60, num_snapshots=0, num_validations=0, **changes)


def trainer(folder: Path, stream: Planted, config: LearningConfig) -> Pretrainer:
    folder.mkdir(exist_ok=True)
    loss = LanguageModelLoss(small_model())
    return Pretrainer(loss, stream, config, Checkpoint(folder, "test", LearningState))


def test_a_leap_is_left_out(tmp_path: Path) -> None:
    state = trainer(tmp_path / "spike", Planted(40), learning()).run()
    assert state.skipped == [40]
    losses = {point.step: point.loss for point in state.curve}
    assert losses[41] > losses[40] + 1
    assert losses[42] < losses[41] - 1  # the weights have not moved
    assert trainer(tmp_path / "even", Planted(), learning()).run().skipped == []


def test_leap_after_leap_stops_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"the loss leapt in 3 of the last 50 steps, to \d+"):
        trainer(tmp_path, Planted(40, 42, 44, 46), learning(max_spikes=2)).run()


def test_nothing_is_measured_where_nothing_shall_be(tmp_path: Path) -> None:
    made = trainer(tmp_path, Planted(), learning())
    state = made.run()
    assert state.validations == []
    assert not list(tmp_path.glob("snapshots/*"))
    assert made.matmul_share is None
    assert state.num_tokens == 60 * 8 * 16


def test_weights_of_a_run_without_a_state_are_forgotten(tmp_path: Path) -> None:
    config = replace(learning(), num_snapshots=2, snapshot_share=0.5)
    stray = tmp_path / "snapshots" / "step-7.safetensors"
    stray.parent.mkdir()
    stray.touch()
    made = trainer(tmp_path, Planted(), config)
    made.run()
    assert snapshots_in(tmp_path) == [45, 60]


def test_rows_must_be_shared_out_evenly(tmp_path: Path) -> None:
    loss = LanguageModelLoss(small_model())
    checkpoint = Checkpoint(tmp_path, "test", LearningState)
    with pytest.raises(EncoderError, match=r"a multiple of the number of processes \(3\), got 8"):
        Pretrainer(loss, Planted(), learning(), checkpoint, devices=Devices(num_processes=3))


def test_weights_are_kept_over_the_last_part_and_at_the_end() -> None:
    config = LearningConfig(steps=90, num_snapshots=3, snapshot_share=0.3, num_validations=2)
    assert snapshot_steps(90, config) == {72, 81, 90}
    assert validation_steps(90, config) == {45, 90}
    assert snapshot_steps(90, replace(config, num_snapshots=0)) == set()
    assert snapshot_steps(1, config) == {1}


def test_frozen_weights_stay(tmp_path: Path) -> None:
    made = trainer(tmp_path, Planted(), learning())
    frozen = made.loss.model.model.embed_tokens.weight
    frozen.requires_grad_(False)
    made = Pretrainer(made.loss, Planted(), learning(), Checkpoint(tmp_path, "test", LearningState))
    before = frozen.clone()
    head = made.loss.model.lm_head.weight.detach().clone()
    made.run()
    assert torch.equal(before, frozen)
    assert not torch.equal(head, made.loss.model.lm_head.weight)
