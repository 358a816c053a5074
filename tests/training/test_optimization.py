import pytest
import torch
from torch import nn

from tests.training.world import small_bahe, small_deep_half, small_schema
from training.build import build_model
from training.optimization import make_average, make_optimizer
from training.recipes import TrainingConfig


def test_learning_rates_and_decay_by_group():
    model = build_model(small_bahe(), small_schema(), small_deep_half())
    config = TrainingConfig(learning_rate=1e-2, deep_learning_rate=1e-4, weight_decay=0.3)
    optimizer = make_optimizer(model, config)
    settings = {
        id(p): (group["peak"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert len(settings) == len(list(model.parameters()))
    names = dict(model.named_parameters())
    assert settings[id(names["tower.output.weight"])] == (1e-2, 0.3)
    assert settings[id(names["tower.output.bias"])] == (1e-2, 0.0)
    assert settings[id(names["tower.position.weight"])] == (1e-2, 0.0)
    deep = [v for n, v in names.items() if "deep_half" in n]
    assert {settings[id(p)] for p in deep} == {(1e-4, 0.3), (1e-4, 0.0)}


def test_frozen_weights_are_left_out():
    model = build_model(small_bahe(), small_schema(), small_deep_half())
    model.tower.output.weight.requires_grad_(False)
    optimizer = make_optimizer(model, TrainingConfig())
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(model.tower.output.weight) not in known
    assert len(known) == len(list(model.parameters())) - 1


def test_average_by_hand():
    model = nn.Linear(1, 1, bias=False)
    average = make_average(model, decay=0.9)
    expected = None
    for number, value in enumerate((1.0, 3.0, -2.0, 5.0)):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update_parameters(model)
        decay = min(0.9, (1 + number) / (10 + number))
        expected = value if expected is None else decay * expected + (1 - decay) * value
    assert float(average.module.weight.detach()) == pytest.approx(expected, rel=1e-6)
