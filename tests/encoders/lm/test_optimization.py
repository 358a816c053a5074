"""Who learns which weights, and that both go on as if nothing had happened."""

from dataclasses import replace

import pytest
import torch

from encoders.devices import Devices
from encoders.lm.optimization import learning_tensors, make_optimizers, restore_learning
from encoders.lm.recipes import LearningConfig, Optimizer
from tests.encoders.lm.planted_models import small_model

CONFIG = LearningConfig(steps=10, learning_rate=1e-2, weight_decay=0.1)
MUON = replace(CONFIG, optimizer="muon")


def learn(model, optimizers, seed: int) -> None:
    """One step on random tokens."""
    ids = torch.randint(0, 20, (2, 8), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_muon_learns_the_matrices_of_the_layers_and_adamw_the_rest() -> None:
    model = small_model()
    names = {id(p): name for name, p in model.named_parameters()}
    adamw, muon = make_optimizers(model, MUON)
    turned = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in adamw.param_groups)
    layers = {name for name in names.values() if ".layers." in name}
    assert turned == {name for name in layers if name.endswith("_proj.weight")}
    assert decayed == {"model.embed_tokens.weight", "lm_head.weight"} & set(names.values())
    assert plain == {name for name in names.values() if "norm" in name}
    assert turned | decayed | plain == set(names.values())
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.1, 0.0]
    assert muon.param_groups[0]["weight_decay"] == 0.1


def test_adamw_learns_everything_alone() -> None:
    model = small_model()
    (adamw,) = make_optimizers(model, CONFIG)
    learned = [id(p) for group in adamw.param_groups for p in group["params"]]
    assert sorted(learned) == sorted(id(p) for p in model.parameters())


def test_frozen_layers_need_no_muon() -> None:
    model = small_model()
    model.model.layers.requires_grad_(False)
    (adamw,) = make_optimizers(model, MUON)
    learned = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert learned == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_restored_goes_on_with_the_same_bits(optimizer: Optimizer) -> None:
    config = replace(CONFIG, optimizer=optimizer)
    model = small_model()
    optimizers = make_optimizers(model, config)
    for seed in range(3):
        learn(model, optimizers, seed)
    live = learning_tensors(model, optimizers, Devices())
    kept = {name: tensor.clone() for name, tensor in live.items()}
    learn(model, optimizers, 3)
    other = small_model()
    begun = make_optimizers(other, config)
    restore_learning(other, begun, kept)
    learn(other, begun, 3)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name
    moments = {name.split("/")[-1] for name in kept if name.startswith("optimizer/")}
    expected = {"exp_avg", "exp_avg_sq", "step"}
    assert moments == (expected | {"momentum_buffer"} if optimizer == "muon" else expected)


def test_a_state_comes_to_the_device_of_the_weights() -> None:
    model = small_model()
    optimizers = make_optimizers(model, MUON)
    learn(model, optimizers, 0)
    with torch.device("meta"):  # stands for a GPU
        other = small_model()
    begun = make_optimizers(other, MUON)
    restore_learning(other, begun, learning_tensors(model, optimizers, Devices()))
    states = [state for optimizer in begun for state in optimizer.state.values()]
    assert len(states) == len(list(other.parameters()))
    assert {value.device.type for state in states for value in state.values()} == {"meta"}
