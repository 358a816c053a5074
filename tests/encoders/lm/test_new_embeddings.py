"""Rows of appended tokens are the means of their pieces' rows; all other rows stay."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from encoders.lm.extend import Appended
from encoders.lm.new_embeddings import enlarge, load_enlarged
from encoders.pretrained import quiet_transformers
from feature_repo.errors import EncoderError

APPENDED = [Appended("ab", 12, (3, 4)), Appended("abc", 13, (3, 4, 5))]
SIZES = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def llama(*, tied: bool, rows: int = 12) -> Any:
    torch.manual_seed(0)
    with quiet_transformers():
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=rows,
                tie_word_embeddings=tied,
                bos_token_id=None,
                eos_token_id=0,
                **SIZES,  # type: ignore[arg-type]
            )
        )


def gpt2() -> Any:
    torch.manual_seed(0)
    with quiet_transformers():
        return GPT2LMHeadModel(GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=2))


def with_bias() -> Any:
    """As Phi has it."""
    model = llama(tied=False)
    torch.manual_seed(1)
    head = nn.Linear(8, 12)
    model.set_output_embeddings(head)
    return model


def tables(model: Any) -> list[torch.Tensor]:
    output = model.get_output_embeddings()
    found = [model.get_input_embeddings().weight, output.weight, output.bias]
    return [table.detach().clone() for table in found if table is not None]


@pytest.mark.parametrize(
    "make",
    [lambda: llama(tied=True), lambda: llama(tied=False), gpt2, with_bias],
    ids=["tied", "untied", "gpt2", "bias"],
)
def test_means(make: Any) -> None:
    model = make()
    before = tables(model)
    enlarge(model, APPENDED)
    after = tables(model)
    assert model.config.vocab_size == 14
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[:12], old)
        torch.testing.assert_close(new[12], (old[3] + old[4]) / 2)
        torch.testing.assert_close(new[13], (old[3] + old[4] + old[5]) / 3)
        assert len(new) == 14
    tied = make().get_input_embeddings().weight is make().get_output_embeddings().weight
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert shared == (model.config.tie_word_embeddings or tied)
    logits = model(torch.tensor([[3, 12, 13]])).logits
    assert logits.shape == (1, 3, 14)


def test_spare_rows_are_used_and_nothing_is_lost() -> None:
    model = llama(tied=False, rows=64)
    enlarge(model, APPENDED)
    weights = model.get_input_embeddings().weight
    assert weights.shape == (64, 8)
    torch.testing.assert_close(weights[12], (weights[3] + weights[4]) / 2)


def test_nothing_appended_changes_nothing() -> None:
    model = llama(tied=True)
    enlarge(model, [])
    assert model.get_input_embeddings().weight.shape == (12, 8)


def test_models_are_loaded_in_their_precision_and_must_fit(tmp_path: Path) -> None:
    with quiet_transformers():
        llama(tied=False).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    model = load_enlarged(tmp_path / "model", 12, APPENDED)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.get_input_embeddings().weight.shape == (14, 8)
    with pytest.raises(EncoderError, match="vectors for 12 tokens, the tokenizer has 400: they do"):
        load_enlarged(tmp_path / "model", 400, APPENDED)
