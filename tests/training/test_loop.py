import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from encoders.checkpoint import Checkpoint
from encoders.devices import Devices
from feature_repo.errors import DataSetError
from feature_repo.progress import silent
from tests.training.world import LENGTH, make_world, small_bahe, small_deep_half, small_recipe
from training.batches import count_batches, plan_batches, split_batch
from training.build import build_model, fit_inputs
from training.checkpoint import RunState
from training.config import MeanPoolingConfig
from training.loop import TRACK_EVERY_STEPS, TrainingLoop
from training.manifest import input_schema
from training.train import read_splits


@dataclass
class Setup:
    """Everything that a loop needs, from a world of 60 users."""

    world: object
    data: dict

    def loop(self, folder: Path, config=None, model=None, progress=silent, **settings):
        """A fresh model and its loop."""
        recipe = small_recipe(**settings)
        schema = input_schema(self.world.sources, recipe, self.data["train"])
        torch.manual_seed(0)
        config = config or small_bahe()
        deep = None if isinstance(config, MeanPoolingConfig) else small_deep_half()
        model = build_model(config, schema, deep)
        train = self.data["train"]
        dense = (train.users.user_dense, train.items.candidate_dense, train.context, train.evidence)
        fit_inputs(model, self.world.sources.table.vectors, dense, base_rate=0.25)
        folder.mkdir(exist_ok=True)
        return TrainingLoop(
            model=model,
            table=torch.from_numpy(self.world.sources.table.vectors),
            train=train,
            valid=self.data["valid"],
            config=recipe.training,
            checkpoint=Checkpoint(folder, "one", RunState),
            progress=progress,
        )


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("loop") / "home", num_users=60)
    torch.set_num_threads(1)
    return Setup(world, read_splits(world.sources, LENGTH))


class KilledError(Exception):
    pass


def killer(steps: int):
    """Progress that ends the process, as it were, with the given step of this call."""

    def progress(advance: int, total: int, **figures: float) -> None:
        nonlocal steps
        steps -= "loss" in figures
        if not steps:
            raise KilledError

    return progress


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_three_moments_and_gone_on_gives_the_same_bits(setup, tmp_path, seed):
    settings = {
        "epochs": 2,
        "batch_contexts": 4 - 2 * seed,
        "checkpoint_every_steps": 5,
        "validations_per_epoch": 2,
        "accumulate_batches": 1 + seed,
    }
    whole = setup.loop(tmp_path / "whole", **settings)
    history = whole.run().history
    assert len(history) == 4
    num_steps = history[-1]["step"]
    moments = sorted(np.random.default_rng(seed).choice(num_steps - 1, 3, replace=False) + 1)
    done = 0
    for moment in moments:
        steps = moment - done
        # The checkpoint lies at most five steps back, so some steps are done again.
        loop = setup.loop(tmp_path / "part", progress=killer(int(steps)), **settings)
        with pytest.raises(KilledError):
            loop.run()
        state = Checkpoint(tmp_path / "part", "one", RunState).state()
        done = 0 if state is None else state.step
        assert moment - 6 <= done < moment
    last = setup.loop(tmp_path / "part", **settings)
    assert last.run().history == history
    expected, found = whole.model.state_dict(), last.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_finished_loop_has_nothing_left_to_do(setup, tmp_path):
    first = setup.loop(tmp_path, epochs=1)
    learned = first.run()
    assert learned.rows_per_s > 0
    again = setup.loop(tmp_path, epochs=1, progress=killer(1))
    learned_again = again.run()
    assert learned_again.history == learned.history
    assert learned_again.rows_per_s is None
    for name, value in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_out_of_patience_it_ends_with_the_best_weights_and_stays_ended(setup, tmp_path):
    # Steps far too small to change a score: no validation is better than the first one.
    settings = {
        "epochs": 9,
        "learning_rate": 1e-30,
        "deep_learning_rate": 1e-30,
        "weight_decay": 0,
        "average_decay": None,
        "patience": 3,
    }
    config = MeanPoolingConfig(output_width=4, hidden=(4,))
    loop = setup.loop(tmp_path, config=config, **settings)
    history = loop.run().history
    assert [entry["epoch"] for entry in history] == [1, 2, 3, 4]
    again = setup.loop(tmp_path, config=config, progress=killer(1), **settings)
    assert again.run().history == history
    patient = setup.loop(tmp_path / "x", config=config, **(settings | {"patience": None}))
    assert len(patient.run().history) == 9


def test_accumulated_batches_equal_one_larger_batch(setup, tmp_path):
    config = MeanPoolingConfig(output_width=8, hidden=(8,), dropout=0.0)
    one = setup.loop(tmp_path / "one", config=config, batch_contexts=32)
    four = setup.loop(tmp_path / "four", config=config, batch_contexts=8, accumulate_batches=4)
    first, second = one.run().history, four.run().history
    assert [e["step"] for e in first] == [e["step"] for e in second]
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(four.model.state_dict()[name], value, atol=1e-6, rtol=0)


def test_a_compiled_loop_learns_the_weights_of_the_model_that_is_kept(setup, tmp_path):
    loop = setup.loop(tmp_path, compiled=True)  # nothing is compiled before the first step
    assert loop._forward is not loop.model
    compiled = dict(loop._forward.named_parameters(remove_duplicate=False))
    for name, parameter in loop.model.named_parameters():
        assert compiled[f"_orig_mod.{name}"] is parameter
    assert setup.loop(tmp_path)._forward.__class__ is loop.model.__class__


class AlikeProcesses(Devices):
    """So many processes that all compute the same: sums over them are multiples."""

    def reduce_gradients(self, model, loss):
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad *= self.num_processes
        return loss * self.num_processes


@pytest.mark.parametrize("num_members", [1, 3])
def test_a_pass_that_all_processes_compute_counts_once(setup, tmp_path, num_members):
    """Of fewer contexts than processes, the clicks' loss and the auxiliary one alike."""
    config = small_bahe(
        next_behavior_weight=2.0, num_members=num_members, dropout=0.0, input_dropout=0.0
    )
    pieces = plan_batches(setup.data["train"], batch_contexts=2, max_candidates=50, seed=1)[0]
    gradients, losses = [], []
    for num_processes in (1, 3):
        devices = AlikeProcesses(num_processes=num_processes)
        loop = setup.loop(tmp_path / str(num_processes), config=config, clip_norm=1e9)
        loop = replace(loop, devices=devices)
        num_rows = int((pieces[:, 2] - pieces[:, 1]).sum())
        losses.append(loop._step(pieces, num_rows, 1.0))
        named = loop.model.named_parameters()
        gradients.append({name: p.grad for name, p in named if p.grad is not None})
    assert losses[1] == pytest.approx(losses[0])
    assert gradients[0]["sharpness"] != 0  # which the auxiliary loss alone moves
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_a_loss_that_is_no_number_stops_with_what_to_do(setup, tmp_path):
    loop = setup.loop(tmp_path)
    with torch.no_grad():
        next(loop.model.parameters()).fill_(torch.nan)
    with pytest.raises(DataSetError, match=re.escape("the loss became nan: lower")):
        loop.run()


def test_curves(setup, tmp_path):
    class Memory:
        def __init__(self):
            self.points = {}

        def settings(self, values):
            raise AssertionError

        def figures(self, step, values):
            for name, value in values.items():
                self.points.setdefault(name, []).append((step, value))

    memory = Memory()
    loop = replace(setup.loop(tmp_path, epochs=2, batch_contexts=2), tracker=memory)
    history = loop.run().history
    num_steps = history[-1]["step"]
    steps = list(range(TRACK_EVERY_STEPS, num_steps + 1, TRACK_EVERY_STEPS))
    assert steps
    assert set(memory.points) == {
        *("train/loss", "train/rows_per_s", "train/learning_rate"),
        *("valid/auc", "valid/logloss"),
    }
    assert [step for step, _ in memory.points["train/loss"]] == steps
    assert memory.points["valid/auc"] == [(e["step"], e["valid_auc"]) for e in history]


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_processes_share_every_pass(setup, num_processes):
    train = setup.data["train"]
    sizes = {"batch_contexts": 10, "max_candidates": 3}
    plan = plan_batches(train, seed=1, **sizes)
    assert len(plan) == count_batches(train, **sizes)
    for pieces in [*plan, plan[0][:1]]:
        weights = np.zeros(len(train))
        num_passes = set()
        for process in range(num_processes):
            passes = list(
                split_batch(pieces, 4, num_processes=num_processes, process_index=process)
            )
            num_passes.add(len(passes))
            for share, weight in passes:
                assert len(share)
                for _, start, end in share:
                    weights[start:end] += weight
        assert len(num_passes) == 1
        expected = np.zeros(len(train))
        for _, start, end in pieces:
            expected[start:end] = 1
        np.testing.assert_allclose(weights, expected)
