"""The same documents every time, of about the size asked for, measured as any text is."""

from pathlib import Path

import pytest
import torch

from encoders.lm.likelihood import measure_likelihood
from encoders.lm.loss import LanguageModelLoss
from encoders.lm.shards import make_shards
from encoders.lm.validation import ALL, ValidationTexts
from feature_repo.home import Home
from tests.encoders.lm.planted_models import byte_tokenizer, small_model
from tests.encoders.lm.small_corpus import texts, write_corpus


def test_documents_are_whole_always_the_same_and_as_many_as_asked_for(tmp_path: Path) -> None:
    home, tokenizer = Home(tmp_path), byte_tokenizer()
    write_corpus(home, texts())
    shards = make_shards(home, tokenizer)["valid"]
    few, again, one, every = (ValidationTexts.choose(shards, n) for n in (300, 300, 1, 10**9))
    for source in ("listings", "baskets"):
        chosen = [tokenizer.decode(tokens[:-1]) for tokens in few.documents[source]]
        assert set(chosen) <= set(texts()[source]["valid"])
        assert few.num_bytes[source] == sum(len(text.encode()) for text in chosen)
        longest = max(len(text.encode()) for text in texts()[source]["valid"])
        assert 300 <= few.num_bytes[source] < 300 + longest
        same = zip(few.documents[source], again.documents[source], strict=True)
        assert all((a == b).all() for a, b in same)
        assert len(one.documents[source]) == 1
        assert len(every.documents[source]) == len(texts()[source]["valid"])
    assert "prose" in few.documents
    empty = ValidationTexts.choose(make_shards(home, tokenizer)["test"], 300)
    assert empty.documents == {}


def test_figures_are_those_of_the_texts(tmp_path: Path) -> None:
    home, tokenizer, model = Home(tmp_path), byte_tokenizer(), small_model(length=32)
    write_corpus(home, texts())
    every = ValidationTexts.choose(make_shards(home, tokenizer)["valid"], 10**9)
    told: list[int] = []

    def progress(advance: int, total: int, **figures: float) -> None:
        told.append(advance)

    figures = every.bits_per_byte(
        LanguageModelLoss(model).eval(),
        start=0,
        device=torch.device("cpu"),
        precision="float32",
        progress=progress,
    )
    everything = [text for source in texts().values() for text in source["valid"]]
    assert sum(told) == len(everything)
    expected = measure_likelihood(model, tokenizer, everything).bits_per_byte
    assert figures[ALL] == pytest.approx(expected, rel=1e-4)
    for source, splits in texts().items():
        expected = measure_likelihood(model, tokenizer, splits["valid"]).bits_per_byte
        assert figures[source] == pytest.approx(expected, rel=1e-4)
