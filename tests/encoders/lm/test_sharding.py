"""Weights that processes share come from the main one, and are put together on it alone."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from encoders.devices import Devices
from encoders.lm.sharding import gather
from tests.encoders.lm.planted_models import small_model
from tests.together import run_together, script

TOGETHER = """
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from encoders.checkpoint import Checkpoint
from encoders.devices import open_devices, torch_threads
from encoders.lm.learning_state import LearningState
from encoders.lm.pretrainer import Pretrainer
from encoders.lm.pretraining_setup import prepare_model
from encoders.lm.sharding import gather
from tests.encoders.lm.planted_models import small_model
from tests.encoders.lm.test_pretrainer import Planted, learning

class Killed(Exception):
    pass

def die():
    raise Killed

def validate():
    return {}

def run(folder, validate, devices):
    folder.mkdir(exist_ok=True)
    config = replace(
        learning(), steps=8, sharded=True, checkpoint_steps=2, num_validations=2
    )
    with torch.device("cpu" if devices.is_main else "meta"):
        model = small_model(tied=True, seed=devices.process_index)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = [name for name, _ in model.named_parameters()]
    loss = prepare_model(model, config, devices)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(p.numel() > p.to_local().numel() for p in model.parameters())
    before = gather(dict(model.named_parameters()), devices)
    checkpoint = Checkpoint(folder, "test", LearningState)
    state = Pretrainer(
        loss, Planted(), config, checkpoint, validate=validate, devices=devices
    ).run()
    assert state.step == 8
    return before, gather(dict(model.named_parameters()), devices)

root = Path(sys.argv[1])
with open_devices(cpu=True) as devices, torch_threads(1):
    before, undisturbed = run(root / "undisturbed", validate, devices)
    try:
        run(root / "killed", die, devices)
    except Killed:
        pass
    devices.wait()
    assert Checkpoint(root / "killed", "test", LearningState).state().step == 2
    _, resumed = run(root / "killed", validate, devices)
    assert devices.is_main or not (before or undisturbed or resumed)
    if devices.is_main:
        for name in ("before", "undisturbed", "resumed"):
            save_file(globals()[name], root / f"{name}.safetensors")
"""


def test_two_processes_begin_with_the_main_ones_weights_and_go_on_with_the_same_bits(
    tmp_path: Path,
) -> None:
    run_together(script(TOGETHER, tmp_path), tmp_path)
    before, undisturbed, resumed = (
        load_file(tmp_path / f"{name}.safetensors") for name in ("before", "undisturbed", "resumed")
    )
    main = dict(small_model(tied=True, seed=0).named_parameters())
    assert before.keys() == main.keys() == undisturbed.keys() == resumed.keys()
    for name, weight in main.items():
        assert torch.equal(before[name], weight), name
        assert torch.equal(undisturbed[name], resumed[name]), name
        assert not torch.equal(undisturbed[name], before[name]), name


def test_whole_tensors_go_to_the_main_process_alone() -> None:
    tensors = {"a": torch.ones(2, requires_grad=True), "b": torch.zeros(())}
    gathered = gather(tensors, Devices())
    assert list(gathered) == ["a", "b"]
    assert not gathered["a"].requires_grad
    assert gather(tensors, Devices(num_processes=2, process_index=1)) == {}
