"""Counts of words, bytes and tokens, by hand."""

import math

from encoders.lm.fertility import Fertility, measure, token_ids, tokens_saved
from tests.encoders.lm.planted_models import byte_tokenizer

TEXTS = ["<|answer|>two words", "café", ""]


def test_words_bytes_and_tokens() -> None:
    found = measure(byte_tokenizer(), TEXTS)  # every byte is a token, a special token is one
    assert found == Fertility(documents=3, bytes=19 + 5, words=3, tokens=1 + 9 + 5)
    assert found.tokens_per_word == 5
    assert found.tokens_per_byte == 15 / 24


def test_batches_do_not_matter() -> None:
    tokenizer = byte_tokenizer()
    many = [f"text {n}" for n in range(2500)]
    assert measure(tokenizer, iter(many)).tokens == sum(map(len, token_ids(tokenizer, many)))


def test_no_text_has_no_figures() -> None:
    nothing = measure(byte_tokenizer(), [])
    assert (nothing.documents, nothing.tokens) == (0, 0)
    assert math.isnan(nothing.tokens_per_word)
    assert math.isnan(nothing.tokens_per_byte)


def test_saved() -> None:
    few, many = (Fertility(documents=1, bytes=9, words=2, tokens=n) for n in (3, 4))
    assert tokens_saved(few, many) == 0.25
