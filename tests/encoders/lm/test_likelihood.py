"""Bits per byte: equal to one token at a time, for any batch, window and vocabulary."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from encoders.lm.documents import end_token, start_token, text_bytes, tokenize_documents
from encoders.lm.likelihood import measure_likelihood
from feature_repo.errors import EncoderError
from tests.encoders.lm.planted_models import byte_tokenizer, chain, planted_model, small_model
from tests.encoders.lm.small_corpus import baskets

TEXTS = ["", "a", "glass teapot", "größer als æther", *baskets(5, seed=0)]


def bits_one_by_one(model: Any, tokens: list[int], start: int, context: int) -> float:
    """Every token from all that its window may see, one forward pass per token."""
    total = 0.0
    for place, token in enumerate(tokens):
        first = 0
        if place >= context:  # windows tell context // 2 new tokens each
            new = context // 2
            stop = min(len(tokens), context + ((place - context) // new + 1) * new)
            first = stop - context
        given = [start if first == 0 else tokens[first - 1], *tokens[first:place]]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([given])).logits[0, -1].double()
        total -= float(logits.log_softmax(0)[token]) / math.log(2)
    return total


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
@pytest.mark.parametrize("context", [8, 33, 128])
def test_bits_are_those_of_one_token_at_a_time(batch_tokens: int, context: int) -> None:
    model, tokenizer = small_model(length=context), byte_tokenizer()
    found = measure_likelihood(model, tokenizer, TEXTS, batch_tokens=batch_tokens)
    for text, bits, length in zip(TEXTS, found.bits, found.num_tokens, strict=True):
        tokens = [*tokenizer(text)["input_ids"], 0]
        assert length == len(tokens)
        assert bits == pytest.approx(bits_one_by_one(model, tokens, 0, context), rel=1e-4)
    assert found.num_bytes.tolist() == [len(text.encode()) for text in TEXTS]
    assert found.bits_per_byte == pytest.approx(found.bits.sum() / found.num_bytes.sum())


class MakesAllLogits(nn.Module):
    """A model of an architecture that cannot leave out logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.whole, self.config, self.device = model, model.config, model.device

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return self.whole(input_ids=input_ids, use_cache=use_cache)


def test_logits_that_nothing_is_told_by_are_left_out_where_the_model_can() -> None:
    model, tokenizer = small_model(length=8), byte_tokenizer()
    made: list[int] = []
    model.lm_head.register_forward_hook(
        lambda _model, _inputs, output: made.append(output[..., 0].numel())
    )
    found = measure_likelihood(model, tokenizer, TEXTS, batch_tokens=32)
    num_made = sum(made)
    made.clear()
    other = measure_likelihood(MakesAllLogits(model), tokenizer, TEXTS, batch_tokens=32)
    np.testing.assert_allclose(found.bits, other.bits, rtol=1e-6)
    # All but the first window of a document tell the second half of theirs.
    assert found.num_tokens.sum() <= num_made < 0.7 * sum(made)


def test_a_uniform_model_needs_the_bits_of_its_vocabulary() -> None:
    model = small_model(num_tokens=264)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = measure_likelihood(model, byte_tokenizer(), ["abcd"])
    # Four bytes and the end token.
    assert found.bits_per_byte == pytest.approx(5 * math.log2(264) / 4, rel=1e-6)


def test_a_model_that_knows_a_text_finds_it_more_likely() -> None:
    tokenizer = byte_tokenizer(["wax"] * 3, num_tokens=262)
    model = planted_model(chain(tokenizer, "lamp"))
    known, other = (measure_likelihood(model, tokenizer, [t]) for t in ("lamp", "pmal"))
    assert known.bits_per_byte < other.bits_per_byte


def test_nothing_is_left_changed_and_nothing_is_needed() -> None:
    model = small_model().train()
    told: list[int] = []

    def progress(advance: int, total: int, **figures: float) -> None:
        told.append(advance)

    found = measure_likelihood(model, byte_tokenizer(), TEXTS, progress=progress)
    assert model.training
    assert sum(told) == found.num_tokens.sum()
    assert math.isnan(measure_likelihood(model, byte_tokenizer(), []).bits_per_byte)


def test_bfloat16_is_near() -> None:
    model, tokenizer = small_model(), byte_tokenizer()
    exact = measure_likelihood(model, tokenizer, TEXTS)
    near = measure_likelihood(model, tokenizer, TEXTS, precision="bfloat16")
    assert near.bits_per_byte == pytest.approx(exact.bits_per_byte, rel=0.02)
    assert near.bits_per_byte != exact.bits_per_byte


def test_documents_end_with_the_end_token() -> None:
    tokenizer = byte_tokenizer()
    assert start_token(tokenizer) == end_token(tokenizer) == tokenizer.eos_token_id
    (tokens,) = tokenize_documents(tokenizer, ["mug"])
    assert (tokens[-1], len(tokens), tokens.dtype) == (tokenizer.eos_token_id, 4, np.int64)
    assert tokenize_documents(tokenizer, []) == []
    assert text_bytes(["é", ""]).tolist() == [2, 0]
    tokenizer.add_special_tokens({"bos_token": "<|answer|>"})
    assert start_token(tokenizer) == tokenizer.bos_token_id != end_token(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(EncoderError, match="has no end token, which language models need"):
        tokenize_documents(tokenizer, ["mug"])
