"""The domain tokenizer: loses nothing, splits no field token, saves tokens, survives a kill."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from encoders.lm.corpus import load_corpus, read_documents
from encoders.lm.corpus_builder import CorpusConfig, build_corpus
from encoders.lm.fertility import measure
from encoders.lm.phrases import learn_phrases
from encoders.lm.pretokenizer import phrase_pre_tokenizer
from encoders.lm.records import field_texts
from encoders.lm.tokenizer import train_tokenizer, training_texts, with_phrases
from encoders.lm.tokenizer_config import TokenizerConfig
from feature_repo.errors import DataSetError, EncoderError, MissingStepError
from feature_repo.home import Home
from tests.encoders.lm.planted_shop import make_shop

RECORDS = ("listings", "baskets", "histories")
SMALL = TokenizerConfig(vocab_size=600, phrase_min_frequency=5)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    made = make_shop(tmp_path_factory.mktemp("shop") / "home")
    build_corpus(made, CorpusConfig(sources=RECORDS))
    return made


@pytest.fixture(scope="module")
def folder(home: Home) -> Path:
    return train_tokenizer(home, SMALL).folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


@settings(derandomize=True, max_examples=500)
@given(st.text(max_size=60) | st.text("<|end>: 0123456789\n", max_size=60))
def test_nothing_is_lost(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_real_documents_are_not_changed(home: Home, tokenizer: Any) -> None:
    for source in RECORDS:
        for text in read_documents(home, "test", source)["text"].to_pylist():
            assert tokenizer.decode(ids(tokenizer, text)) == text


def test_field_tokens_are_single_and_have_the_first_ids(home: Home, tokenizer: Any) -> None:
    special = load_corpus(home).special_tokens
    assert [ids(tokenizer, token) for token in special] == [[n] for n in range(len(special))]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")
    assert set(tokenizer.all_special_tokens) == set(special)
    text = "red<|field:price|>2<|end|>"
    assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=True) == "red2"


def test_no_token_has_more_than_three_digits_or_a_line_end_within(tokenizer: Any) -> None:
    for token in tokenizer.get_vocab():
        assert sum(character.isdigit() for character in token) <= 3
        assert "Ċ" not in token.strip("Ċ") or set(token) <= {"Ċ", "č"}
    pieces = tokenizer.convert_ids_to_tokens(ids(tokenizer, "1234567"))
    assert "".join(pieces) == "1234567"
    assert all(piece in "1234567" and len(piece) <= 3 for piece in pieces)


def test_phrases_save_tokens_of_held_out_text(home: Home, tokenizer: Any) -> None:
    words = train_tokenizer(home, replace(SMALL, name="words", phrase_share=0.0))
    assert words.report.num_phrases == 0
    plain = AutoTokenizer.from_pretrained(words.folder)
    texts = read_documents(home, "test", "baskets")["text"].to_pylist()
    assert measure(tokenizer, texts).tokens < 0.8 * measure(plain, texts).tokens
    assert any(re.search(r"\wĠ\w", token) for token in tokenizer.get_vocab())
    assert not any(re.search(r"\wĠ\w", token) for token in plain.get_vocab())


def test_the_encoder_ends_where_the_trainer_ended(home: Home) -> None:
    words = train_tokenizer(home, replace(SMALL, name="words", phrase_share=0.0)).folder
    base = with_phrases(AutoTokenizer.from_pretrained(words).backend_tokenizer, [])
    cut = phrase_pre_tokenizer()
    rows = {}
    for text, count in training_texts(home, RECORDS, 10**9).items():
        for piece, _ in cut.pre_tokenize_str(text):
            rows[tuple(token.value for token in base.model.tokenize(piece))] = count
    options = {"min_frequency": 2, "min_texts": 2}
    phrases = learn_phrases(rows, base.get_vocab(), num_merges=500, **options)
    assert len(phrases) > 20
    encoder = with_phrases(base, phrases)
    assert encoder.get_vocab_size() == base.get_vocab_size() + len(phrases)
    for tokens in rows:
        left = list(tokens)
        for pair in phrases:  # as the trainer applied them, one after the other
            place = 0
            while place < len(left) - 1:
                if (left[place], left[place + 1]) == pair:
                    left[place : place + 2] = ["".join(pair)]
                place += 1
        assert [token.value for token in encoder.model.tokenize("".join(tokens))] == left


def test_the_vocabulary_is_as_large_as_asked_for_or_as_the_text_allows(home: Home) -> None:
    small = train_tokenizer(home, replace(SMALL, name="small", vocab_size=330)).report
    assert small.vocab_size == 330
    large = train_tokenizer(home, replace(SMALL, name="large", vocab_size=65_536)).report
    assert 330 < large.vocab_size < 2000


def test_training_again_changes_nothing_until_a_setting_does(home: Home, folder: Path) -> None:
    path = folder / "tokenizer.json"
    before, changed = path.read_bytes(), path.stat().st_mtime_ns
    assert train_tokenizer(home, SMALL).folder == folder
    assert path.stat().st_mtime_ns == changed
    try:
        train_tokenizer(home, replace(SMALL, vocab_size=330))
        assert path.read_bytes() != before
    finally:
        train_tokenizer(home, SMALL)
    assert path.read_bytes() == before


class Killed(BaseException):
    """Stands for a signal: nothing but the files remains."""


def test_a_killed_run_keeps_its_words(home: Home, folder: Path) -> None:
    config = replace(SMALL, name="killed")
    texts: list[int] = []

    def read(advance: int, total: int, **figures: float) -> None:
        texts.append(advance)

    def kill(advance: int, total: int, **figures: float) -> None:
        raise Killed

    with pytest.raises(Killed):
        train_tokenizer(home, config, read, phrase_progress=kill)
    assert not (home.tokenizers / "killed").exists()
    num_texts = len(texts)
    assert num_texts > 50
    summary = train_tokenizer(home, config, read)
    assert len(texts) == num_texts  # none is read again
    made = (summary.folder / "tokenizer.json").read_bytes()
    assert made == (folder / "tokenizer.json").read_bytes()
    assert not list(home.tokenizers.glob("*.part"))


def test_sentences(home: Home, tmp_path: Path) -> None:
    with pytest.raises(MissingStepError, match="run `longtrail lm corpus` first"):
        train_tokenizer(Home(tmp_path), SMALL)
    with pytest.raises(DataSetError, match="the corpus has no source 'docs': it has baskets, "):
        train_tokenizer(home, replace(SMALL, sources=("docs",)))
    path = home.corpus / "manifest.json"
    before = path.read_text()
    try:
        content = json.loads(before)
        content["sources"]["listings"]["splits"]["train"] = {"documents": 0, "bytes": 0}
        path.write_text(json.dumps(content))
        with pytest.raises(DataSetError, match="listings has no training text to learn a token"):
            train_tokenizer(home, replace(SMALL, sources=("listings",)))
    finally:
        path.write_text(before)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"name": "../up"}, "made of letters, digits, _, . and -, got '../up'"),
        ({"vocab_size": 300}, "vocab_size must be at least 320, got 300"),
        ({"phrase_share": 1.0}, r"phrase_share must be in \[0, 0.9\], got 1.0"),
        ({"phrase_min_texts": 0}, "phrase_min_texts must be at least 1, got 0"),
    ],
)
def test_the_configuration_is_checked(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EncoderError, match=sentence):
        TokenizerConfig(**change)


def test_field_texts_are_counted(home: Home) -> None:
    texts = training_texts(home, ["baskets"], 10**9)
    documents = read_documents(home, "train", "baskets")["text"].to_pylist()
    assert texts.total() == sum(len(field_texts(text)) for text in documents)
    part = training_texts(home, ["baskets"], 2000)
    assert 0 < part.total() < texts.total() / 2
