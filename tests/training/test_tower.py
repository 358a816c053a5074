"""Every option of the deep half: what it computes, what learns, and that it can be exported."""

import sys

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from encoders.loaded_artifact import read_program
from encoders.split import DeepHalf
from feature_repo.errors import EncoderError
from tests.training.world import (
    SCENES,
    WIDTH,
    random_inputs,
    small_bahe,
    small_deep_half,
    small_schema,
)
from training.candidates import FlatCandidates
from training.deep_half import add_adapters
from training.optimization import make_average, make_optimizer
from training.program import save_program
from training.program_inputs import ClickModel, ProgramInputs
from training.recipes import TrainingConfig
from training.tower import Tower


class TowerModel(ClickModel):
    """The smallest click model around a tower: users times items."""

    def __init__(self, deep_half: nn.Module | None = None, **changes: object) -> None:
        super().__init__()
        config = small_bahe(**changes)
        if deep_half is None and config.use_deep_half:
            deep_half = small_deep_half()
        torch.manual_seed(0)
        self.tower = Tower(config, WIDTH, deep_half, num_scenes=len(SCENES))

    def users(self, table, rows, ages):
        return self.tower.scenes(lambda places: table[places], rows, ages)

    def logits(self, inputs: ProgramInputs) -> torch.Tensor:
        flat = FlatCandidates(inputs.candidate_item_keys)
        users = self.users(inputs.table, inputs.history_rows, inputs.history_ages)
        items = self.tower.items(inputs.table[flat.select(inputs.candidate_rows)])
        return flat.restore((flat.spread(users).sum(1) * items).sum(-1))


def make(deep_half=None, **changes):
    model = TowerModel(deep_half, **changes).eval()
    torch.manual_seed(1)
    with torch.no_grad():  # no parameter may hide behind its start
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def one_sequence():
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(2, 5, WIDTH, generator=generator)
    keep = torch.tensor([[False, True, True, True, False], [False] * 5])
    return vectors, torch.full((2, 5), 7200.0), keep


@pytest.mark.parametrize("pooling", ["mean_newest", "mean", "newest", "attention"])
def test_pooling_by_hand(pooling):
    tower = make(pooling=pooling).tower
    vectors, ages, keep = one_sequence()
    states = tower.states(vectors, ages, keep)[0, 1:4]
    pooled = {"mean": states.mean(0), "newest": states[2]}
    pooled["mean_newest"] = torch.cat([pooled["mean"], pooled["newest"]])
    if pooling == "attention":
        pooled["attention"] = (states @ tower.query / WIDTH**0.5).softmax(0) @ states
    found = tower.sequences(vectors, ages, keep)
    torch.testing.assert_close(found[0], tower.output(pooled[pooling]), atol=1e-6, rtol=1e-5)
    assert torch.equal(found[1], tower.empty)
    found.sum().backward()
    gradients = [p.grad for p in tower.parameters() if p.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_attention_pooling_starts_as_the_mean():
    mean, attention = (TowerModel(pooling=pooling).eval() for pooling in ("mean", "attention"))
    inputs = random_inputs(4, 3, 30)
    torch.testing.assert_close(attention(*inputs), mean(*inputs), atol=1e-6, rtol=1e-5)


def test_an_item_is_a_sequence_of_one_state():
    for pooling in ("mean", "newest", "attention"):
        tower = make(pooling=pooling).tower
        vectors = torch.randn(3, WIDTH)
        x = (vectors * tower.scale + tower.item).unsqueeze(1)
        states = tower.output_norm(tower.deep_half(x, torch.ones(3, 1, dtype=torch.long)))
        torch.testing.assert_close(tower.items(vectors), tower.output(states[:, 0]))


def test_without_positions_the_order_tells_nothing():
    vectors, ages, _ = one_sequence()
    keep = torch.ones(2, 5, dtype=torch.bool)
    for position, same in (("none", True), ("distance", False)):
        tower = make(position=position, pooling="mean").tower
        found = [tower.sequences(v, ages, keep) for v in (vectors, vectors.flip(1))]
        assert torch.allclose(*found, atol=1e-5) is same


def test_scenes_with_a_half_each_and_items_through_the_first():
    model = make(share_scenes=False)
    table, rows, _, ages = random_inputs(4, 1, 40)[:4]
    rows[:] = rows[:1, :1] + 1  # the same history in both scenes of every context

    def outputs():
        return model.users(table, rows, ages), model.tower.items(table)

    def move(half):
        with torch.no_grad():
            list(half.parameters())[-1].mul_(3)

    users, items = outputs()
    assert (users[:, 0] - users[:, 1]).abs().max() > 1e-4
    move(model.tower.deep_half[1])
    second_users, second_items = outputs()
    assert torch.equal(second_users[:, 0], users[:, 0])
    assert torch.equal(second_items, items)
    assert not torch.equal(second_users[:, 1], users[:, 1])
    move(model.tower.deep_half[0])
    assert not torch.equal(outputs()[1], items)


def test_scenes_that_share_nothing_must_be_named():
    tower = make(share_scenes=False).tower
    with pytest.raises(ValueError, match="say which scene this is"):
        tower.sequences(*one_sequence())


def test_separate_halves_start_equal_and_learn_at_the_deep_rate():
    tower = TowerModel(share_scenes=False).tower
    first, second = (half.state_dict() for half in tower.deep_half)
    assert all(torch.equal(first[name], second[name]) for name in first)
    shared = {id(p) for p in tower.deep_half[0].parameters()}
    assert not shared & {id(p) for p in tower.deep_half[1].parameters()}
    names = [f".tower.{name}" for name, _ in tower.named_parameters()]
    assert sum(".deep_half." in name for name in names) == 2 * len(first)


def learned(model):
    """Names of what gets a gradient, after one backward pass."""
    model.train()(*random_inputs(5, 3, 40)).sum().backward()
    return {n for n, p in model.named_parameters() if p.grad is not None and (p.grad != 0).any()}


def test_a_frozen_half_passes_gradients_on_and_takes_none():
    names = learned(TowerModel(fine_tune="frozen"))
    assert {"tower.scale", "tower.item", "tower.position.weight", "tower.empty"} <= names
    assert not any("deep_half" in name for name in names)


def test_lora_starts_as_the_pretrained_half_and_only_adapters_learn():
    full, lora = TowerModel(), TowerModel(fine_tune="lora", lora_rank=2)
    lora.load_state_dict(full.state_dict(), strict=False)  # all that has the same name
    inputs = random_inputs(5, 3, 40)
    torch.testing.assert_close(lora.eval()(*inputs), full.eval()(*inputs), atol=1e-6, rtol=1e-6)
    deep = {name for name in learned(lora) if "deep_half" in name}
    # Two layers of six linear maps; an adapter's second matrix starts at zero and moves first.
    assert len(deep) == 12
    assert all(".lora_B." in name for name in deep)
    sizes = {p.shape[1] for n, p in lora.named_parameters() if ".lora_B." in n}
    assert sizes == {2}


def llama_half():
    with torch.random.fork_rng():
        torch.manual_seed(8)
        config = LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            vocab_size=30,
        )
        return DeepHalf(LlamaModel(config), split_layer=1)


@pytest.mark.parametrize(
    ("make_half", "top"),
    [(small_deep_half, ("encoder.layer.1.",)), (llama_half, ("layers.2.", "model.norm."))],
)
@pytest.mark.parametrize("share_scenes", [True, False])
def test_the_top_layers_learn_and_those_below_keep_their_bits(make_half, top, share_scenes):
    model = TowerModel(make_half(), num_trained_layers=1, share_scenes=share_scenes).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    average = make_average(model, 0.9)
    optimizer = make_optimizer(model, TrainingConfig(weight_decay=0.1))
    inputs = random_inputs(5, 3, 40)
    for _ in range(2):
        optimizer.zero_grad()
        model(*inputs).square().sum().backward()
        optimizer.step()
        average.update_parameters(model)
    deep = {name for name, _ in model.named_parameters() if ".deep_half." in name}
    learning = {name for name in deep if any(part in name for part in top)}
    assert learning
    assert deep - learning
    averaged = average.module.state_dict()
    for name, value in model.state_dict().items():
        if name in deep:
            changed = not torch.equal(value, before[name])
            assert changed is (name in learning), name
            assert changed or torch.equal(averaged[name], value), name
    gradients = {name for name, p in model.named_parameters() if p.grad is not None}
    assert gradients & deep == learning


def test_all_layers_by_number_learn_like_all_layers():
    assert learned(TowerModel(num_trained_layers=2)) == learned(TowerModel())


def test_lora_of_the_top_layers_alone():
    model = TowerModel(fine_tune="lora", num_trained_layers=1)
    adapters = [name for name, _ in model.named_parameters() if ".lora_" in name]
    assert len(adapters) == 12  # two matrices beside each of a layer's six linear maps
    assert all("encoder.layer.1." in name for name in adapters)
    assert {name for name in learned(model) if "deep_half" in name} <= set(adapters)


def test_more_layers_than_there_are_cannot_learn():
    with pytest.raises(EncoderError, match=r"num_trained_layers must be in \[1, 2\].*got 3"):
        TowerModel(num_trained_layers=3)
    with pytest.raises(ValueError, match=r"num_trained_layers needs an encoders\.split\.DeepHalf"):
        TowerModel(nn.Identity(), num_trained_layers=1)


def test_weights_with_adapters_can_be_loaded():
    model, fresh = make(fine_tune="lora"), TowerModel(fine_tune="lora").eval()
    fresh.load_state_dict(model.state_dict())
    inputs = random_inputs(5, 3, 40)
    assert torch.equal(fresh(*inputs), model(*inputs))


def test_lora_without_its_package_or_anything_to_adapt_says_so(monkeypatch):
    with pytest.raises(EncoderError, match="a Identity has none"):
        add_adapters(nn.Identity(), rank=2)
    monkeypatch.setitem(sys.modules, "peft", None)  # what Python notes for a missing package
    with pytest.raises(EncoderError, match=r"pip install 'longtrail\[lora\]'"):
        TowerModel(fine_tune="lora")


@pytest.mark.parametrize("use_bfloat16", [False, True])
def test_checkpointed_gradients_are_the_same_and_layers_run_twice(use_bfloat16):
    gradients, calls = [], []
    for flag in (False, True):
        model = TowerModel(gradient_checkpointing=flag, use_bfloat16=use_bfloat16).train()
        calls.append(0)
        query = next(m for n, m in model.named_modules() if n.endswith("self.query"))
        query.register_forward_hook(lambda *_: calls.__setitem__(-1, calls[-1] + 1))
        model(*random_inputs(5, 3, 40)).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert calls[1] == 2 * calls[0]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_checkpointing_needs_layers():
    with pytest.raises(ValueError, match=r"needs an encoders\.split\.DeepHalf, got a Identity"):
        TowerModel(nn.Identity(), gradient_checkpointing=True)


class CountingHalf(nn.Module):
    """A deep half that notes how many sequences it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_deep_half()
        self.num_sequences: list[int] = []

    def forward(self, inputs_embeds, attention_mask):
        self.num_sequences.append(len(inputs_embeds))
        return self.inner(inputs_embeds, attention_mask)


def test_all_candidates_of_a_context_share_one_user_pass():
    half = CountingHalf()
    model = TowerModel(half).eval()
    inputs = random_inputs(4, 6, 40)
    model(*inputs)
    some = (inputs[1] != 0).any(-1).sum(0).tolist()  # contexts with a history, by scene
    assert half.num_sequences == [*some, 4 * 6]


OPTIONS = (
    {"pooling": "mean", "position": "none", "share_scenes": False},
    {"pooling": "newest", "use_deep_half": False},
    {"pooling": "attention", "fine_tune": "lora", "gradient_checkpointing": True},
)


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda options: "-".join(map(str, options.values()))
)
def test_every_option_can_be_exported(options, tmp_path):
    model = make(small_deep_half(1) if options.get("use_deep_half", True) else None, **options)
    save_program(model, small_schema(), tmp_path / "score.pt2")
    program = read_program(tmp_path / "score.pt2").module()
    for sizes in ((1, 1, 2), (6, 9, 40)):
        inputs = random_inputs(*sizes, seed=sum(sizes))
        torch.testing.assert_close(program(*inputs), model(*inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"pooling": "max"},
            "pooling must be one of mean_newest, mean, newest, attention, got 'max'",
        ),
        ({"position": "model"}, "position must be one of distance, none, got 'model'"),
        ({"fine_tune": "half"}, "fine_tune must be one of full, lora, frozen, got 'half'"),
        ({"num_trained_layers": 0}, "num_trained_layers must be at least 1, got 0"),
        (
            {"num_trained_layers": 3, "num_deep_layers": 2},
            r"num_trained_layers must be at most num_deep_layers \(2\), got 3",
        ),
        (
            {"num_trained_layers": 1, "fine_tune": "frozen"},
            "num_trained_layers is 1, but with fine_tune 'frozen' none learns",
        ),
        ({"lora_rank": 0}, "lora_rank must be at least 1, got 0"),
    ],
)
def test_bad_options_say_what_is_allowed(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        small_bahe(**changes)
