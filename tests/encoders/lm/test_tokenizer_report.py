"""The report: what it counts, and a page that needs nothing else."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from encoders.config import DEFAULT_MODEL
from encoders.lm.corpus import load_corpus, read_documents
from encoders.lm.corpus_builder import CorpusConfig, build_corpus
from encoders.lm.fertility import token_ids
from encoders.lm.filters import FilterConfig
from encoders.lm.text_files import FileSource
from encoders.lm.tokenizer import train_tokenizer, training_texts
from encoders.lm.tokenizer_config import TokenizerConfig
from encoders.lm.tokenizer_report import (
    FIELDS,
    PAGE_FILE,
    REPORT_FILE,
    TokenizerReport,
    held_out_texts,
    reference_tokenizers,
)
from feature_repo.home import Home
from tests.encoders.lm.planted_shop import TITLES, make_shop

REVIEWS = [f"We bought {n} of these plates, and they came in a very nice box." for n in range(300)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("shop")
    for place, text in enumerate(REVIEWS):
        (folder / f"{place}.txt").write_text(text)
    made = make_shop(folder / "home")
    files = (FileSource("reviews", "general", str(folder / "*.txt")),)
    filters = FilterConfig(near_duplicates=None)
    build_corpus(made, CorpusConfig(sources=("listings", "baskets"), files=files, filters=filters))
    return made


@pytest.fixture(scope="module")
def folder(home: Home) -> Path:
    return train_tokenizer(home, TokenizerConfig(vocab_size=400)).folder


@pytest.fixture(scope="module")
def report(folder: Path) -> TokenizerReport:
    return TokenizerReport.load(folder / REPORT_FILE, made_by="longtrail lm tokenizer")


def test_held_out_text_is_measured_by_source_and_language(
    home: Home, report: TokenizerReport
) -> None:
    parts = held_out_texts(home, load_corpus(home))
    assert parts["baskets"] == read_documents(home, "test", "baskets")["text"].to_pylist()
    assert set(parts[FIELDS]) <= {*TITLES, "home & gifts"}
    assert len(set(parts[FIELDS])) == len(parts[FIELDS])
    assert set(report.sources) == {"domain", DEFAULT_MODEL}
    for figures in report.sources.values():
        assert {part: found.documents for part, found in figures.items()} == {
            part: len(texts) for part, texts in parts.items()
        }
    assert report.languages["domain"]["en"] == report.sources["domain"]["reviews"]
    # Both know the field tokens: no order costs MiniLM more than a token for each.
    own, other = (report.sources[name]["baskets"] for name in ("domain", DEFAULT_MODEL))
    assert own.tokens < other.tokens < own.bytes / 3


def test_unused_tokens_and_coverage(home: Home, folder: Path, report: TokenizerReport) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == report.vocab_size
    seen = set(tokenizer.all_special_ids)
    for text in training_texts(home, list(load_corpus(home).sources), 10**9):
        seen |= set(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert report.num_unused == report.vocab_size - len(seen)
    single = total = 0
    for texts in held_out_texts(home, load_corpus(home)).values():
        for text, ids in zip(texts, token_ids(tokenizer, texts), strict=True):
            kept = [i for i in ids if i not in tokenizer.all_special_ids]
            total += len("".join(re.split(r"<\|[^|]+\|>", text)).encode())
            single += sum(len(token) == 1 for token in tokenizer.convert_ids_to_tokens(kept))
    assert report.coverage == pytest.approx(1 - single / total)


def test_the_page_needs_nothing_else(folder: Path, report: TokenizerReport) -> None:
    page = (folder / PAGE_FILE).read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=[\"']?(?!#)\w+:", page)
    assert page.count("<svg") == 2
    for text in ("Tokenizer domain", "By source", "Free text by language", f"of {DEFAULT_MODEL}"):
        assert text in page
    assert f"{report.sources['domain']['baskets'].tokens:,}" in page


def test_a_reference_knows_the_field_tokens() -> None:
    (reference,) = reference_tokenizers(["<|order|>", "<|scene:buy|>"]).values()
    ids = token_ids(reference, ["<|order|><|scene:buy|>bag"])[0]
    assert reference.convert_ids_to_tokens(ids) == ["<|order|>", "<|scene:buy|>", "bag"]
