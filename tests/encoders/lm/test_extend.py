"""Appended tokens: no input ever gets longer, every input decodes as before."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from encoders.lm.extend import Extension, append_tokens, token_text
from encoders.lm.pretokenizer import phrase_pre_tokenizer, word_pre_tokenizer
from encoders.lm.tokenizer_config import ExtendConfig
from feature_repo.errors import EncoderError
from tests.encoders.lm.planted_shop import TITLES

GENERAL = [
    "Return the next item from the iterator, or the default value if there is none.",
    "A set is an unordered collection with no duplicate elements; this is a light holder.",
    "The key function is called for each item in the list before the comparison is made.",
    "Whitespace\n\n    is kept   as it is, 1234567 times.",
]
FEW = ExtendConfig(num_tokens=200, min_frequency=2)


def base(pre_tokenizer: Any, *, ignore_merges: bool = False, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(GENERAL, trainer)
    tokenizer.add_special_tokens(["<|added|>"])
    return tokenizer


LLAMA_3 = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
BASES = {
    "gpt2": base(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "prefix_space": base(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "llama3": base(LLAMA_3, ignore_merges=True),
    "normalized": base(word_pre_tokenizer(), normalizer=normalizers.NFC()),
    "phrases": base(phrase_pre_tokenizer()),
}


def content(tokenizer: Tokenizer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    return found


@pytest.fixture(scope="module", params=list(BASES))
def pair(request: pytest.FixtureRequest) -> tuple[Tokenizer, Extension]:
    tokenizer = BASES[request.param]
    return tokenizer, append_tokens(content(tokenizer), TITLES * 3, FEW)


def assert_no_longer(before: Tokenizer, after: Tokenizer, texts: Sequence[str]) -> int:
    """And decode alike; how many became shorter."""
    old, new = before.encode_batch(texts), after.encode_batch(texts)
    shorter = 0
    for text, one, other in zip(texts, old, new, strict=True):
        assert len(other.ids) <= len(one.ids), text
        assert after.decode(other.ids) == before.decode(one.ids), text
        shorter += len(other.ids) < len(one.ids)
    return shorter


@settings(derandomize=True, max_examples=300)
@given(st.text(max_size=50) | st.text("abdeghilnorst -3\n", max_size=50))
def test_no_input_gets_longer(pair: tuple[Tokenizer, Extension], text: str) -> None:
    before, extension = pair
    assert_no_longer(before, extension.tokenizer, [text])


def test_thousands_of_strings(pair: tuple[Tokenizer, Extension]) -> None:
    before, extension = pair
    random = np.random.default_rng(0)
    alphabet = [*map(chr, range(0x20, 0x180)), *"日本語🙂\u0301\u200d\n\t"]
    strings = ["".join(random.choice(alphabet, random.integers(40))) for _ in range(1500)]
    words = sorted({word for text in (*TITLES, *GENERAL) for word in text.split(" ")})
    strings += [" ".join(random.choice(words, random.integers(1, 9))) for _ in range(1500)]
    shorter = assert_no_longer(before, extension.tokenizer, strings)
    assert shorter > 800


def test_domain_text_gets_shorter_by_tokens_with_new_ids(pair: tuple[Tokenizer, Extension]) -> None:
    before, extension = pair
    after = extension.tokenizer
    old = sum(len(encoding.ids) for encoding in before.encode_batch(TITLES))
    new = sum(len(encoding.ids) for encoding in after.encode_batch(TITLES))
    assert new < 0.6 * old
    first = max(before.get_vocab(with_added_tokens=True).values()) + 1
    ids = [token.token_id for token in extension.appended]
    assert ids == list(range(first, first + len(ids)))
    for token in extension.appended:
        assert after.token_to_id(token.token) == token.token_id
        pieces = [before.id_to_token(piece) for piece in token.pieces]
        assert len(pieces) >= 2
        assert "".join(pieces) == token.token
        assert [piece.value for piece in before.model.tokenize(token.token)] == pieces
    old_vocabulary = before.get_vocab(with_added_tokens=True)
    new_vocabulary = after.get_vocab(with_added_tokens=True)
    assert old_vocabulary.items() <= new_vocabulary.items()
    assert len(new_vocabulary) == len(old_vocabulary) + len(ids)


def toy(merges: list[Any]) -> dict[str, Any]:
    """A base that knows the letters of "abcd" and some merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["".join(m.split(" ") if isinstance(m, str) else m) for m in merges]
    vocabulary = {token: place for place, token in enumerate([*alphabet, *names])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = content(tokenizer)
    made["model"]["merges"] = merges
    return made


def test_the_algorithm_by_hand() -> None:
    # The domain's own tokenizer learns "ab" (9), "abc" (9), then "abcd" (5) by the frequency of
    # pairs. The base has "bc": it writes "abc" as a + bc, so "ab" would be no step to it.
    found = append_tokens(
        toy([["b", "c"]]), ["abc"] * 4 + ["abcd"] * 5, ExtendConfig(num_tokens=9, min_frequency=5)
    )
    assert [token.token for token in found.appended] == ["abc", "abcd"]
    assert found.content["model"]["merges"] == [["b", "c"], ["a", "bc"], ["abc", "d"]]
    vocabulary = found.content["model"]["vocab"]
    assert [vocabulary["abc"], vocabulary["abcd"]] == [257, 258]
    pieces = [vocabulary[token] for token in ("a", "bc", "d")]
    assert [token.pieces for token in found.appended] == [tuple(pieces[:2]), tuple(pieces)]
    one = append_tokens(
        toy([["b", "c"]]), ["abc"] * 4 + ["abcd"] * 5, ExtendConfig(num_tokens=1, min_frequency=5)
    )
    assert [token.token for token in one.appended] == ["abc"]


def test_without_the_rule_of_use_steps_stay() -> None:
    found = append_tokens(
        toy([["b", "c"]]), ["abc"] * 9, ExtendConfig(num_tokens=9, min_frequency=5, min_use=0.0)
    )
    assert [token.token for token in found.appended] == ["ab", "abc"]


def test_merges_are_written_as_the_base_writes_them() -> None:
    found = append_tokens(toy(["b c"]), ["abc"] * 9, ExtendConfig(num_tokens=5, min_frequency=2))
    assert found.content["model"]["merges"] == ["b c", "a bc"]
    assert found.tokenizer.encode("abc").tokens == ["abc"]


def test_texts_without_anything_new_append_nothing() -> None:
    before = content(BASES["gpt2"])
    found = append_tokens(before, [], FEW)
    assert found == Extension(before, [])


WORDPIECE = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))  # noqa: S106
SENTENCEPIECE = Tokenizer(models.BPE({"a": 0}, [], byte_fallback=True))
SENTENCEPIECE.pre_tokenizer = pre_tokenizers.Metaspace()


@pytest.mark.parametrize(
    ("tokenizer", "what"),
    [(WORDPIECE, "a WordPiece model"), (SENTENCEPIECE, "a BPE model that is not byte-level")],
)
def test_other_tokenizers_are_refused(tokenizer: Tokenizer, what: str) -> None:
    with pytest.raises(EncoderError, match=f"the tokenizer is {what}: tokens can only be appended"):
        append_tokens(content(tokenizer), TITLES, FEW)


def test_token_text() -> None:
    assert token_text("ĠcafÃ©") == " café"
    assert token_text("Ã") is None
    assert token_text("<|end|>☃") is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
        ({"min_use": 2.0}, r"min_use must be in \[0, 1\], got 2.0"),
    ],
)
def test_the_configuration_is_checked(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EncoderError, match=sentence):
        ExtendConfig(**change)
