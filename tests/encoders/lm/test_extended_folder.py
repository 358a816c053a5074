"""``lm extend`` from a corpus to a folder that loads like any other."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from encoders.lm.corpus import read_documents
from encoders.lm.corpus_builder import CorpusConfig, build_corpus
from encoders.lm.extend import Appended
from encoders.lm.extended_folder import (
    REPORT_FILE,
    ExtensionReport,
    extend_tokenizer,
    token_use,
)
from encoders.lm.text_files import FileSource
from encoders.lm.tokenizer import train_tokenizer
from encoders.lm.tokenizer_config import ExtendConfig, TokenizerConfig
from encoders.lm.tokenizer_report import FIELDS
from feature_repo.errors import DataSetError, EncoderError, MissingStepError
from feature_repo.home import Home
from tests.encoders.lm.planted_models import byte_tokenizer, save, small_model
from tests.encoders.lm.planted_shop import TITLES, make_shop

CONFIG = ExtendConfig(num_tokens=60, min_frequency=2)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    made = make_shop(tmp_path_factory.mktemp("shop") / "home")
    build_corpus(made, CorpusConfig(sources=("listings", "baskets")))
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    tokenizer = byte_tokenizer(TITLES[:4], num_tokens=270)
    save(small_model(len(tokenizer)), tokenizer, folder)
    (folder / "vocab.json").write_text("{}")  # of the old form: it would contradict
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_a_tokenizer_alone(home: Home, base: Path) -> None:
    summary = extend_tokenizer(home, str(base), "extended", CONFIG)
    assert summary.folder == home.tokenizers / "extended"
    names = {path.name for path in summary.folder.iterdir()}
    assert names == {
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("extension_report.json", "report.html"),
    }
    report = ExtensionReport.load(summary.folder / REPORT_FILE, made_by="longtrail lm extend")
    assert report == summary.report
    assert (report.base, report.name, report.model) == (str(base), "extended", None)
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (base, summary.folder))
    assert len(new) == len(old) + report.num_appended == report.vocab_size_before + 60
    assert (new.eos_token_id, new.pad_token_id) == (old.eos_token_id, old.pad_token_id)
    texts = read_documents(home, "test", "baskets")["text"].to_pylist()
    before, after = (
        sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
        for tokenizer in (old, new)
    )
    assert after < 0.7 * before
    assert report.tokens_saved > 0.3
    assert report.use.texts_used == 1
    assert report.use.pairs_used > 0.9
    ours, theirs = report.sources["extended"], report.sources[f"{base} (base)"]
    assert ours.keys() == theirs.keys() == {"listings", "baskets", FIELDS}
    page = (summary.folder / "report.html").read_text(encoding="utf-8")
    assert f"{report.tokens_saved:.1%}" in page
    assert "Before and after" in page
    assert "<svg" in page  # tokens per byte, plotted
    assert not re.findall(r"(?:src|href)=[\"']?(?!#)\w+:", page)


def test_a_model_with_its_tokenizer(home: Home, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "larger"
    summary = extend_tokenizer(home, str(base), "larger", CONFIG, model=base, folder=folder)
    assert summary.report.model == str(base)
    old_model, model = (AutoModelForCausalLM.from_pretrained(f) for f in (base, folder))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert model.config.vocab_size == len(tokenizer)
    num_old = old_model.config.vocab_size
    # On text without appended tokens it is the model that it was.
    ids = torch.arange(num_old)[None, :100]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[..., :num_old], old_model(ids).logits)
    with pytest.raises(EncoderError, match="larger exists already, made from another base, corpus"):
        extend_tokenizer(home, str(base), "larger", CONFIG, folder=folder)
    default = extend_tokenizer(home, str(base), "mine", CONFIG, model=base)
    assert default.folder == home.models / "mine"


def test_the_same_again_does_nothing_and_another_is_refused(
    home: Home, base: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    made = extend_tokenizer(home, str(copy), "again", CONFIG, model=copy)
    written = (made.folder / "model.safetensors").stat().st_mtime_ns
    again = extend_tokenizer(home, str(copy), "again", CONFIG, model=copy)
    assert again == made
    assert (made.folder / "model.safetensors").stat().st_mtime_ns == written
    refused = "again exists already, made from another base, corpus or settings: give another"
    with pytest.raises(EncoderError, match=refused):
        extend_tokenizer(home, str(copy), "again", replace(CONFIG, num_tokens=5), model=copy)
    save(small_model(270, seed=1), byte_tokenizer(TITLES[:4], num_tokens=270), copy)
    with pytest.raises(EncoderError, match=refused):
        extend_tokenizer(home, str(copy), "again", CONFIG, model=copy)
    alone = extend_tokenizer(home, str(copy), "alone", CONFIG)
    (copy / "chat_template.jinja").write_text("{{ others }}")
    with pytest.raises(EncoderError, match="alone exists already, made from another base"):
        extend_tokenizer(home, str(copy), "alone", CONFIG)
    # What others made is not replaced by a tokenizer of the corpus' own.
    with pytest.raises(EncoderError, match="alone holds a tokenizer that `longtrail lm tokenizer"):
        train_tokenizer(home, TokenizerConfig(name="alone", vocab_size=400))
    assert len(AutoTokenizer.from_pretrained(alone.folder)) == alone.report.vocab_size_before + 60


def test_use_is_counted_by_text_and_by_token() -> None:
    tokenizer = byte_tokenizer(["red bag"], num_tokens=270)
    vocabulary = tokenizer.get_vocab()
    appended = [Appended(name, vocabulary[name], ()) for name in ("red", "Ġbag")]
    never = Appended("ed", 9999, ())
    texts = ["red bag", "redder", "bags", "a bed"]
    assert tokenizer.tokenize("redder")[0] == "red"
    use = token_use(tokenizer, [*appended, never], texts)
    # "red bag" holds all three strings, "redder" two, "bags" none, and "a bed" one.
    assert (use.num_texts, use.num_pairs) == (3, 6)
    assert use.texts_used == pytest.approx(2 / 3)
    assert use.pairs_used == pytest.approx(5 / 6)  # "ed" is a part of "red"


def test_sentences(home: Home, base: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingStepError, match="run `longtrail lm corpus` first"):
        extend_tokenizer(Home(tmp_path / "new"), str(base), "x", CONFIG)
    with pytest.raises(EncoderError, match="there is no tokenizer 'nothing': expected a folder"):
        extend_tokenizer(home, "nothing", "x", CONFIG)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(EncoderError, match=f"the tokenizer in {broken} cannot be loaded: "):
        extend_tokenizer(home, str(broken), "x", CONFIG)
    other = tmp_path / "other"
    save(small_model(250), byte_tokenizer(), other)
    with pytest.raises(EncoderError, match="vectors for 250 tokens, the tokenizer has 260: they"):
        extend_tokenizer(home, str(other), "x", CONFIG, model=other)
    assert not (home.tokenizers / "x").exists()
    assert not (home.models / "x").exists()
    general = make_shop(tmp_path / "general")
    (tmp_path / "text.txt").write_text("All of these are general words, and there are a few.\n")
    files = (FileSource("text", "general", str(tmp_path / "text.txt")),)
    build_corpus(general, CorpusConfig(sources=(), files=files))
    with pytest.raises(DataSetError, match="the corpus has no domain text to learn tokens from"):
        extend_tokenizer(general, str(base), "x", CONFIG)
