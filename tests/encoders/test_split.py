"""A split model equals the whole one, layer by layer, in every supported family."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.export import Dim
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModel,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    EsmConfig,
    EsmModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2Model,
    RobertaConfig,
    RobertaModel,
)

from encoders.config import DEFAULT_MODEL
from encoders.layout import layer_stack
from encoders.pretrained import find_model_folder, quiet_transformers
from encoders.split import DeepHalf, ShallowHalf, load_deep_half, load_shallow_half
from feature_repo.errors import EncoderError

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
DISTILBERT_SIZES = {"dim": 16, "hidden_dim": 32, "n_layers": 4, "n_heads": 4, "vocab_size": 100}
GROUPED = {"num_key_value_heads": 2, **SIZES}
FAMILIES = {
    "bert": lambda: BertModel(BertConfig(**SIZES)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZES)),
    "distilbert": lambda: DistilBertModel(DistilBertConfig(**DISTILBERT_SIZES)),
    "llama": lambda: LlamaModel(LlamaConfig(**GROUPED)),
    "mistral": lambda: MistralModel(MistralConfig(sliding_window=4, **GROUPED)),
    # Two layers attend to everything, two in a window: the cut must keep which is which.
    "qwen2": lambda: Qwen2Model(
        Qwen2Config(use_sliding_window=True, sliding_window=3, max_window_layers=2, **GROUPED)
    ),
}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(3)
    made: PreTrainedModel = FAMILIES[request.param]().eval()
    return made


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(5, 100, (3, 9), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def mask() -> torch.Tensor:
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, 5:] = 0
    mask[1, 8:] = 0
    return mask


@pytest.mark.parametrize("split_layer", [1, 2, 3])
@torch.inference_mode()
def test_halves_equal_the_whole_token_by_token(
    model: PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor, split_layer: int
) -> None:
    whole = model(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
    shallow = ShallowHalf(copy.deepcopy(model), split_layer)
    deep = DeepHalf(copy.deepcopy(model), split_layer)
    kept = mask.bool()

    states = shallow(tokens, mask)
    torch.testing.assert_close(
        states[kept], whole.hidden_states[split_layer][kept], rtol=0, atol=1e-6
    )
    last = deep(states, mask)
    torch.testing.assert_close(last[kept], whole.last_hidden_state[kept], rtol=0, atol=1e-6)
    assert len(layer_stack(shallow.model)) == split_layer
    assert len(layer_stack(deep.model)) == 4 - split_layer
    assert shallow.width == deep.width == 16


@torch.inference_mode()
def test_the_shallow_half_of_all_layers_is_the_whole_model(
    model: PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor
) -> None:
    whole = model(input_ids=tokens, attention_mask=mask).last_hidden_state
    states = ShallowHalf(copy.deepcopy(model), 4)(tokens, mask)
    torch.testing.assert_close(states[mask.bool()], whole[mask.bool()], rtol=0, atol=1e-6)


@torch.inference_mode()
def test_no_mask_means_that_every_token_is_kept(
    model: PreTrainedModel, tokens: torch.Tensor
) -> None:
    half = ShallowHalf(copy.deepcopy(model), 2)
    torch.testing.assert_close(half(tokens), half(tokens, torch.ones_like(tokens)))


def test_padding_on_the_left_gives_finite_states_and_gradients(
    model: PreTrainedModel, mask: torch.Tensor
) -> None:
    deep = DeepHalf(model, 2).train()
    left = mask.flip(1)
    states = deep(torch.randn(3, 9, 16), left)
    assert torch.isfinite(states).all()
    states[left.bool()].square().sum().backward()
    gradients = [parameter.grad for parameter in deep.parameters()]
    assert gradients
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)


def test_checkpointing_computes_layers_twice_in_the_given_contexts(
    model: PreTrainedModel, mask: torch.Tensor
) -> None:
    entered: list[str] = []

    @contextmanager
    def note(which: str) -> Iterator[None]:
        entered.append(which)
        yield

    gradients = []
    for checkpointed in (False, True):
        deep = DeepHalf(copy.deepcopy(model), 2).train()
        if checkpointed:
            deep.checkpoint_gradients(lambda: (note("first"), note("again")))
        vectors = torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(8))
        torch.manual_seed(9)  # dropout, where a family has it
        deep(vectors, mask)[mask.bool()].square().sum().backward()
        gradients.append([parameter.grad for parameter in deep.parameters()])
    assert entered == ["first", "first", "again", "again"]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_deep_half_exports_with_a_dynamic_batch(family: str) -> None:
    torch.manual_seed(5)
    deep = DeepHalf(FAMILIES[family]().eval(), 2)
    batch = Dim("batch")
    program = torch.export.export(
        deep,
        (torch.randn(3, 9, 16), torch.ones(3, 9, dtype=torch.long)),
        dynamic_shapes={"inputs_embeds": {0: batch}, "attention_mask": {0: batch}},
        strict=False,
    )
    vectors, mask = torch.randn(7, 9, 16), torch.ones(7, 9, dtype=torch.long)
    mask[:4, :3] = 0
    torch.testing.assert_close(program.module()(vectors, mask), deep(vectors, mask))


@pytest.mark.parametrize("split_layer", [1, 3, 5])
@torch.inference_mode()
def test_real_model_equals_its_halves(split_layer: int) -> None:
    with quiet_transformers():
        model = AutoModel.from_pretrained(find_model_folder(DEFAULT_MODEL)).eval()
    tokens = torch.randint(1000, 20000, (4, 12), generator=torch.Generator().manual_seed(6))
    mask = torch.ones_like(tokens)
    mask[0, 7:] = 0
    whole = model(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
    states = load_shallow_half(DEFAULT_MODEL, split_layer)(tokens, mask)
    last = load_deep_half(DEFAULT_MODEL, split_layer)(states, mask)
    kept = mask.bool()
    torch.testing.assert_close(
        states[kept], whole.hidden_states[split_layer][kept], rtol=0, atol=1e-5
    )
    torch.testing.assert_close(last[kept], whole.last_hidden_state[kept], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_num_layers_keeps_the_first_deep_layers(bert_folder: Path) -> None:
    model = AutoModel.from_pretrained(bert_folder).eval()
    tokens, mask = torch.arange(4, 12)[None], torch.ones(1, 8, dtype=torch.long)
    hidden = model(input_ids=tokens, output_hidden_states=True).hidden_states
    deep = load_deep_half(str(bert_folder), 1, num_layers=2)
    torch.testing.assert_close(deep(hidden[1], mask), hidden[3], rtol=0, atol=1e-6)


@torch.inference_mode()
def test_fewer_layers_of_a_decoder_keep_its_final_norm(llama_folder: Path) -> None:
    model = AutoModel.from_pretrained(llama_folder).eval()
    tokens, mask = torch.arange(4, 12)[None], torch.ones(1, 8, dtype=torch.long)
    hidden = model(input_ids=tokens, output_hidden_states=True).hidden_states
    deep = load_deep_half(str(llama_folder), 1, num_layers=2)
    torch.testing.assert_close(deep(hidden[1], mask), model.norm(hidden[3]), rtol=0, atol=1e-6)


def test_only_the_deep_half_is_trainable(model_folder: Path) -> None:
    shallow = load_shallow_half(str(model_folder), 2)
    deep = load_deep_half(str(model_folder), 2)
    assert not any(parameter.requires_grad for parameter in shallow.parameters())
    assert all(parameter.requires_grad for parameter in deep.parameters())


@pytest.mark.parametrize("split_layer", [0, -1, 5])
def test_shallow_half_names_the_allowed_layers(model_folder: Path, split_layer: int) -> None:
    with pytest.raises(EncoderError, match=rf"in \[1, 4\] .* 4 layers, got {split_layer}$"):
        load_shallow_half(str(model_folder), split_layer)


@pytest.mark.parametrize("split_layer", [0, 4, 5])
def test_deep_half_names_the_allowed_layers(model_folder: Path, split_layer: int) -> None:
    with pytest.raises(EncoderError, match=rf"in \[1, 3\] .* 4 layers, got {split_layer}$"):
        load_deep_half(str(model_folder), split_layer)


@pytest.mark.parametrize("num_layers", [0, 3])
def test_num_layers_names_the_allowed_range(model_folder: Path, num_layers: int) -> None:
    with pytest.raises(EncoderError, match=rf"num_layers must be in \[1, 2\].*got {num_layers}"):
        load_deep_half(str(model_folder), 2, num_layers=num_layers)


def test_an_unknown_layout_is_refused() -> None:
    albert = AlbertModel(AlbertConfig(embedding_size=8, **SIZES))
    with pytest.raises(EncoderError, match="cannot split a AlbertModel: expected its layers under"):
        ShallowHalf(albert, 2)


def test_a_norm_that_we_do_not_know_of_is_noticed(tmp_path: Path) -> None:
    """ESM has BERT's layout, and a norm after the last layer that a cut would leave in place."""
    torch.manual_seed(7)
    with quiet_transformers():
        EsmModel(EsmConfig(pad_token_id=1, mask_token_id=3, **SIZES)).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="does not split at layer 2"):
        load_shallow_half(str(tmp_path), 2)
