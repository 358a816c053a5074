"""The program in three parts says what the whole says, and each part holds its own weights only."""

import numpy as np
import pytest
import torch

from encoders.loaded_artifact import Parts, read_program
from feature_repo.artifact import Calibration
from tests.training.world import (
    LENGTH,
    SCENES,
    random_inputs,
    small_bahe,
    small_deep_half,
    small_schema,
)
from training.calibration import CalibratedModel
from training.config import TreesConfig
from training.layers import PiecewiseLinear, RunningNorm
from training.model import Bahe
from training.parts import deep_model, save_parts
from training.trees import Ensemble, Trees

CALIBRATION = Calibration(
    method="platt", knots=(0.0,), values=(0.25,), slope_below=1.5, slope_above=1.5
)


def make_model(**changes):
    torch.manual_seed(3)
    config = small_bahe(**changes)
    half = small_deep_half(config.num_deep_layers) if config.use_deep_half else None
    model = Bahe(config, small_schema(), half)
    if config.id_width is not None:
        model.ids.set_vocabulary([np.arange(0, 20, 2) * 11])
    for parameter in model.parameters():  # some begin as zeros, which would hide mistakes
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    for module in model.modules():  # so do all statistics of the training rows
        if isinstance(module, PiecewiseLinear):
            module.set_edges(np.random.default_rng(4).normal(size=(50, len(module.edges))))
        if isinstance(module, RunningNorm):
            module.mean.uniform_(-1, 1)
            module.square.uniform_(1, 4)
    return model.eval()


@pytest.mark.parametrize(
    ("changes", "with_trees"),
    [
        ({}, False),
        ({}, True),
        (
            {"num_crosses": 1, "use_target_attention": False, "use_text_evidence": False},
            False,
        ),
        ({"use_deep_half": False, "use_age": False}, False),
        ({"share_scenes": False, "deep_length": 3}, False),
        ({"num_crosses": 1}, False),
        ({"num_crosses": 0, "num_members": 1, "use_target_attention": False}, False),
        ({"id_width": 3}, False),
        ({"id_width": 3, "num_crosses": 1}, True),
    ],
    ids=[
        "whole",
        "with trees",
        "late fusion alone",
        "no deep half or age",
        "own deep halves",
        "folded",
        "folded, without crosses",
        "ids",
        "ids, folded, with trees",
    ],
)
def test_parts_equal_the_whole(tmp_path, changes, with_trees):
    network = make_model(**changes)
    model = Ensemble(network, Trees(TreesConfig(), small_schema())) if with_trees else network
    form = save_parts(model, CALIBRATION, small_schema(), tmp_path)
    assert form.output_width == network.config.output_width
    assert form.deep_length == network.config.deep_length
    names = ("users", "items", "head")
    parts = Parts(form, *(read_program(tmp_path / f"{name}.pt2").module() for name in names))
    inputs = random_inputs(3, 5, 20)
    found = parts.score(*inputs)
    table, rows, _, ages = inputs[:4]
    assert parts.users(table, rows, ages).shape == (3, len(SCENES), form.output_width)
    with torch.inference_mode():
        expected = CalibratedModel(model, CALIBRATION).eval()(*inputs)
    np.testing.assert_allclose(found.detach(), expected, atol=1e-5)
    assert float(found.detach().std()) > 1e-3


def test_each_part_holds_its_own_weights_only(tmp_path):
    model = make_model()
    save_parts(model, CALIBRATION, small_schema(), tmp_path)
    names = {
        part: set(read_program(tmp_path / f"{part}.pt2").state_dict)  # refuses what is pickled
        for part in ("users", "items", "head")
    }
    assert all(".tower." in f".{name}." or ".space." in f".{name}." for name in names["users"])
    assert names["items"] == names["users"]
    assert not any(".tower." in f".{name}." for name in names["head"])
    # What was shared for the export is whole again.
    assert hasattr(model, "tower")
    assert hasattr(model, "perceptron")


def test_outputs_change_at_the_edges_and_nowhere_else(tmp_path):
    model = make_model()
    form = save_parts(model, CALIBRATION, small_schema(), tmp_path)
    program = read_program(tmp_path / "users.pt2").module()
    table = random_inputs(2, 2, 20)[0]
    rows = torch.zeros((1, len(SCENES), LENGTH), dtype=torch.int64)
    rows[0, 0, -1] = 4

    def output(age):
        ages = torch.zeros(rows.shape)
        ages[0, 0, -1] = age
        return program(table, rows, ages).detach()

    edges = np.array(form.age_edges_s)
    assert (edges[1:] == 2 * edges[:-1]).all()
    for low, edge in zip([0.0, *edges[:4]], edges[:5], strict=True):
        assert torch.equal(output(low + 1), output(edge - 1))
        assert not torch.equal(output(edge - 1), output(edge + 1))
    without = make_model(use_age=False)
    assert save_parts(without, CALIBRATION, small_schema(), tmp_path).age_edges_s == ()


def test_only_models_with_deep_outputs_have_parts(tmp_path):
    trees = Trees(TreesConfig(), small_schema())
    numbers = make_model(
        use_text=False,
        use_deep_half=False,
        use_text_evidence=False,
        use_target_attention=False,
        next_behavior_weight=0.0,
    )
    states = make_model(attention_over="states")
    for model in (trees, numbers, Ensemble(numbers, trees), states, Ensemble(states, trees)):
        assert deep_model(model) is None
        assert save_parts(model, CALIBRATION, small_schema(), tmp_path) is None
    assert not list(tmp_path.iterdir())
    # Where there is no attention, nothing reads the states.
    assert deep_model(make_model(attention_over="states", use_target_attention=False)) is not None
