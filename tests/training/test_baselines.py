"""Baselines that learn vectors of item ids, and DIN's attention against the paper's equation."""

import numpy as np
import pytest
import torch

from encoders.loaded_artifact import read_program
from feature_repo.artifact import PROGRAM_INPUTS
from tests.training.world import SCENES, random_inputs, small_schema
from training.baselines import DinAttention
from training.build import build_model, fit_inputs
from training.candidates import FlatCandidates
from training.config import DcnConfig, DinIdsConfig, DinTextConfig
from training.item_ids import ItemEmbedding
from training.program import save_program
from training.recipes import RECIPES

DIN_IDS = DinIdsConfig(id_width=4, attention_hidden=5, hidden=(8,))
DCN = DcnConfig(id_width=4, num_bins=4, numeric_width=2, cross_rank=3, hidden=(8,))
DIN_TEXT = DinTextConfig(output_width=4, attention_hidden=5, hidden=(8,))
every_model = pytest.mark.parametrize("config", [DIN_IDS, DCN, DIN_TEXT])
KEYS = np.arange(1, 31) * 11
"""Of the items in the training rows; :func:`random_inputs` has others, too."""
WIDTHS = (1, 2, 1, len(small_schema().evidence_names))
"""Of user, item and context features and evidence."""


def make(config):
    torch.manual_seed(0)
    model = build_model(config, small_schema())
    dense = [np.random.default_rng(0).normal(size=(50, n)).astype(np.float32) for n in WIDTHS]
    fit_inputs(model, np.eye(5, 16, dtype=np.float32), dense, base_rate=0.25, item_keys=[KEYS])
    return model.eval()


@every_model
def test_candidates_are_scored_one_by_one_and_padding_changes_nothing(config):
    model, inputs = make(config), random_inputs(5, 4, 40)
    whole = model(*inputs)
    assert whole.shape == (5, 4)
    assert torch.isfinite(whole).all()
    for candidate in range(4):
        alone = [
            t[:, candidate : candidate + 1]
            if name.startswith("candidate") or name in ("context", "evidence")
            else t
            for name, t in zip(PROGRAM_INPUTS, inputs, strict=True)
        ]
        torch.testing.assert_close(model(*alone)[:, 0], whole[:, candidate], atol=1e-5, rtol=1e-5)
    inputs[7][1, 2:] = 0
    kept = inputs[7] != 0
    torch.testing.assert_close(model(*inputs)[kept], whole[kept], atol=1e-5, rtol=1e-5)


@every_model
def test_exported_program_equals_the_eager_model(config, tmp_path):
    model = make(config)
    save_program(model, small_schema(), tmp_path / "score.pt2")
    program = read_program(tmp_path / "score.pt2").module()
    for sizes in ((1, 1, 2), (6, 9, 40)):
        inputs = random_inputs(*sizes, seed=sum(sizes))
        torch.testing.assert_close(program(*inputs), model(*inputs), atol=1e-5, rtol=1e-5)


@every_model
def test_everything_learns(config):
    model = make(config).train()
    model(*random_inputs(8, 3, 40)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("config", [DIN_IDS, DCN])
def test_the_vocabulary_comes_back_with_the_weights(config):
    model, fresh = make(config), build_model(config, small_schema()).eval()
    fresh.load_state_dict(model.state_dict())
    inputs = random_inputs(5, 3, 40)
    assert torch.equal(fresh(*inputs), model(*inputs))


@pytest.mark.parametrize("config", [DIN_IDS, DCN])
def test_a_model_of_ids_must_be_given_ids(config):
    model, dense = build_model(config, small_schema()), [np.zeros((2, n)) for n in WIDTHS]
    with pytest.raises(ValueError, match="learns a vector per item: give item_keys"):
        fit_inputs(model, np.zeros((2, 16), np.float32), dense, base_rate=0.5)


def test_keys_are_found_and_all_else_is_zero():
    big = 2**62 + 1
    ids = ItemEmbedding(3)
    ids.set_vocabulary([np.array([[5, 0], [big, 9]]), np.array([9, 2])])
    asked = torch.tensor([[0, 2, 5, 9], [big, big + 1, big - 1, 1]])
    assert ids.indices(asked).tolist() == [[0, 1, 2, 3], [4, 0, 0, 0]]
    vectors = ids(asked)
    assert vectors.shape == (2, 4, 3)
    assert ((vectors != 0).all(-1) == (ids.indices(asked) != 0)).all()
    assert ((vectors == 0).all(-1) == (ids.indices(asked) == 0)).all()
    vectors.sum().backward()
    assert (ids.table.weight.grad[0] == 0).all()  # "unknown" stays zero


def test_an_empty_vocabulary_knows_nothing():
    ids = ItemEmbedding(3)
    ids.set_vocabulary([np.zeros(4, np.int64)])
    assert ids.indices(torch.tensor([0, 1, 77])).tolist() == [0, 0, 0]


def test_din_attention_equals_the_papers_equation():
    torch.manual_seed(2)
    attention = DinAttention(3, 4)
    flat = FlatCandidates(torch.tensor([[4, 0], [7, 8]]))  # one candidate, then two
    history, items = torch.randn(2, 2, 5, 3), torch.randn(3, 3)
    keep = torch.rand(2, 2, 5) < 0.6
    keep[0, 0] = False
    found = attention(flat, history, keep, items)
    # One first layer over [h, c, h - c, h * c]; h - c adds its weights to those of h and c.
    difference = torch.randn(4, 3)
    weights = torch.cat(
        [
            attention.from_history.weight - difference,
            attention.from_candidate.weight + difference,
            difference,
            attention.from_product.weight,
        ],
        dim=1,
    )
    expected = torch.zeros(3, 2, 3)
    for row, context in enumerate((0, 1, 1)):
        for scene in range(2):
            for m in range(5):
                if keep[context, scene, m]:
                    h, c = history[context, scene, m], items[row]
                    x = weights @ torch.cat([h, c, h - c, h * c]) + attention.from_history.bias
                    expected[row, scene] += attention.attention(torch.relu(x)) * h
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_din_on_ids_reads_known_ids_and_nothing_else():
    model, inputs = make(DIN_IDS), random_inputs(5, 3, 30)
    whole = model(*inputs)
    for place in (0, 1, 3, 4, 5, 6, 8, 9, 10):  # all but the item keys
        inputs[place] = torch.zeros_like(inputs[place])
    assert torch.equal(model(*inputs), whole)
    unknown = [t.clone() for t in inputs]
    unknown[2][inputs[2] != 0] += 1  # no multiple of 11: in no vocabulary
    empty = [t.clone() for t in inputs]
    empty[2][:] = 0
    assert torch.equal(model(*unknown), model(*empty))
    assert not torch.equal(model(*unknown), whole)


def test_dcn_reads_no_sequence():
    model, inputs = make(DCN), random_inputs(5, 3, 30)
    whole = model(*inputs)
    for place in (0, 1, 2, 3, 4, 6):
        inputs[place] = torch.zeros_like(inputs[place])
    assert torch.equal(model(*inputs), whole)
    inputs[7] = inputs[7] + 1
    assert not torch.isclose(model(*inputs), whole).any()


@pytest.mark.parametrize("name", ["din_ids", "dcn_v2"])
def test_recipes_are_baselines_that_can_be_built(name):
    recipe = RECIPES[name]()
    assert recipe.name == name
    assert recipe.baseline
    model = build_model(recipe.model, small_schema())
    assert model(*random_inputs(2, 3, 9)).shape == (2, 3)
    assert len(SCENES) == 2


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        (DinIdsConfig, {"id_width": 0}, "id_width must be at least 1, got 0"),
        (DinIdsConfig, {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        (DcnConfig, {"num_crosses": -1}, "num_crosses must be at least 0, got -1"),
        (DcnConfig, {"cross_rank": 0}, "cross_rank must be at least 1, got 0"),
    ],
)
def test_bad_config_says_what_is_allowed(kind, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        kind(**changes)
