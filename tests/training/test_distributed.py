"""Two processes on the CPU against one: the same loss, the same weights up to rounding."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from encoders.checkpoint import checkpoint_folder
from encoders.devices import Devices, open_devices, torch_threads
from feature_repo.artifact import current_run, finished_runs, load_run_manifest
from feature_repo.materialize import apply
from feature_repo.publish import FILES_PROFILE
from tests.faults.world import RUN, TRAIN
from tests.live_home import RUN as LIVE_RUN
from tests.live_home import make_home
from tests.together import run_together, script
from tests.training.world import make_world, small_bahe
from training.__main__ import command_line
from training.recipes import Recipe, TrainingConfig
from training.train import train

NUM_USERS = 60


def recipe() -> Recipe:
    """What several processes learn alike: no dropout, no loss over the items of a batch.

    The last batch has one context: 84 contexts, 83 to a batch.
    """
    return Recipe(
        name="shared",
        model=small_bahe(dropout=0.0, input_dropout=0.0, next_behavior_weight=0.0),
        training=TrainingConfig(
            epochs=2,
            batch_contexts=83,
            accumulate_batches=1,
            learning_rate=5e-3,
            average_decay=0.5,
            validations_per_epoch=2,
        ),
        sequence_length=8,
    )


TOGETHER = """
import json, sys
from dataclasses import asdict
from pathlib import Path
import torch
from torch import nn
from tests.training.test_distributed import NUM_USERS, recipe
from tests.training.world import make_world
from encoders.devices import open_devices
from training.train import train

root = Path(sys.argv[1])
with open_devices(cpu=True) as devices:
    model = nn.ParameterList([nn.Parameter(torch.zeros(2)) for _ in range(3)])
    if devices.is_main:
        model[0].grad = torch.tensor([1.0, 2.0])
    model[1].grad = torch.tensor([10.0, 20.0]) * (1 + devices.process_index)
    loss = devices.reduce_gradients(model, torch.tensor(1.5))
    gradients = [None if p.grad is None else p.grad.tolist() for p in model]
    if devices.is_main:
        make_world(root / "home", num_users=NUM_USERS)
    devices.wait()
    world = make_world(root / f"sources-{devices.process_index}", num_users=NUM_USERS)
    object.__setattr__(world.sources, "home", type(world.sources.home)(root / "home"))
    result = train(world.sources, recipe(), run="shared", threads=1, devices=devices)
    told = {"loss": float(loss), "gradients": gradients, "index": devices.process_index}
    told |= {"history": result.history, "metrics": result.metrics, "num": result.num_processes}
    (root / f"told-{devices.process_index}.json").write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    root = tmp_path_factory.mktemp("together")
    run_together(script(TOGETHER, root), root)
    return root, [json.loads((root / f"told-{i}.json").read_text()) for i in range(2)]


def test_gradients_are_added_up_and_none_stays_none(together):
    for told in together[1]:
        assert told["loss"] == 3.0
        assert told["gradients"] == [[1.0, 2.0], [30.0, 60.0], None]


def test_two_processes_learn_what_one_learns(together, tmp_path):
    root, (first, second) = together
    assert first["num"] == 2
    for key in ("history", "metrics", "num"):
        assert first[key] == second[key]
    world = make_world(tmp_path / "home", num_users=NUM_USERS)
    alone = train(world.sources, recipe(), run="alone", threads=1)
    assert len(alone.history) == 4
    for entry, expected in zip(first["history"], alone.history, strict=True):
        assert entry["step"] == expected["step"]
        assert entry["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
        assert entry["valid_logloss"] == pytest.approx(expected["valid_logloss"], rel=1e-4)
    shared = load_file(root / "home" / "runs" / "shared" / "weights.safetensors")
    for name, value in load_file(alone.folder / "weights.safetensors").items():
        torch.testing.assert_close(shared[name], value, atol=1e-4, rtol=1e-3, msg=name)
    assert not list((root / "home" / "runs").glob("*.part"))


def test_torchrun_of_the_module_trains_one_run_in_two_processes(tmp_path):
    home = make_home(tmp_path)
    apply(home, FILES_PROFILE)
    shared = ["--home", home.root, "--profile", FILES_PROFILE]
    output = run_together("-m", "training", "--", *shared, *TRAIN[1:])
    told = json.loads(output)  # one line, of the main process
    assert told["run"] == RUN
    assert told["num_processes"] == 2
    assert not told["resumed"]
    assert told["rows_per_s"] > 0
    assert finished_runs(home) == sorted([RUN, LIVE_RUN])
    manifest = load_run_manifest(home, RUN)
    assert manifest.recipe == told["recipe"] == "bahe_small"
    assert {split: told[split] for split in ("valid", "test")} == manifest.metrics
    assert current_run(home) == RUN
    assert not checkpoint_folder(home.runs / RUN).exists()
    assert not list(home.runs.glob("*.part"))


def test_alone_nothing_is_shared():
    with open_devices(cpu=True) as devices:
        assert devices == Devices()
        assert devices.is_main
        assert devices.agree("name") == "name"
        model = torch.nn.Linear(1, 1)
        assert devices.reduce_gradients(model, loss := torch.tensor(2.0)) is loss


def test_random_streams_depend_on_their_numbers_and_the_process():
    def draw(process: int, *numbers: int) -> list[float]:
        Devices(num_processes=2, process_index=process).seed(*numbers)
        return torch.rand(3).tolist()

    streams = [draw(0, 1, 2, 3), draw(1, 1, 2, 3), draw(0, 2, 1, 3), draw(0, 1, 3, 2)]
    assert draw(0, 1, 2, 3) == streams[0]
    assert all(streams.count(stream) == 1 for stream in streams)


def test_threads_are_shared_by_the_processes_of_a_machine(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    for processes, share in ((1, 6), (2, 3)):
        with torch_threads(None, num_local_processes=processes) as number:
            assert number == share
    # Told from outside, one process does so; torchrun tells its processes 1, whatever the cores.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with torch_threads(2), torch_threads(None) as number:
        assert number == 2  # what torch has made of the variable
    with torch_threads(None, num_local_processes=2) as number:
        assert number == 3
    with torch_threads(None, num_local_processes=10_000) as number:
        assert number == torch.get_num_threads() == 1
    with torch_threads(3) as number:
        assert number == 3
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--recipe bahe_base", "train --recipe bahe_base"),
        ("--recipe x --home /h --seed 1", "--home /h train --recipe x --seed 1"),
        ("--profile=p --verbose --help", "--profile=p --verbose train --help"),
        ("--cpu --home", "--home train --cpu"),
    ],
)
def test_module_takes_the_options_of_longtrail_and_of_train(given, expected):
    assert command_line(given.split()) == expected.split()
