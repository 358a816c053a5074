"""``lm tokenizer`` and ``lm extend`` as users meet them."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from encoders.lm.cli_tokenizer import commands
from encoders.lm.corpus_builder import CorpusConfig, build_corpus
from feature_repo.command import SentenceGroup, Settings
from feature_repo.home import Home
from tests.encoders.lm.planted_models import byte_tokenizer, save, small_model
from tests.encoders.lm.planted_shop import make_shop


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = make_shop(tmp_path / "home")
    build_corpus(made, CorpusConfig(sources=("listings", "baskets")))
    return made


def run(home: Home, *arguments: str) -> Any:
    group = SentenceGroup(commands=commands)
    return CliRunner().invoke(group, list(arguments), obj=Settings(home, "embedded"))


def test_tokenizer_prints_one_line(home: Home) -> None:
    result = run(home, "tokenizer", "--from", "listings", "--from", "baskets")
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout)
    assert line["folder"] == str(home.tokenizers / "domain")
    assert f"Stopped at {line['vocab_size']:,} of 65,536 tokens: no other pair" in result.stderr
    assert line["phrases"] > 0
    assert line["tokens_per_byte"]["domain"]["baskets"] < 0.2
    assert len(AutoTokenizer.from_pretrained(line["folder"])) == line["vocab_size"]
    words = json.loads(run(home, "tokenizer", "--name", "words", "--phrase-share", "0").stdout)
    assert (words["name"], words["phrases"]) == ("words", 0)


def test_tokenizer_builds_the_corpus_where_there_is_none(tmp_path: Path) -> None:
    home = make_shop(tmp_path / "bare")
    result = run(home, "tokenizer", "--phrase-share", "0", "--from", "listings")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["vocab_size"] > 270
    assert {path.stem for path in (home.corpus / "train").iterdir()} == {
        *("listings", "baskets", "histories", "python_docs")
    }


def test_extend_prints_one_line(home: Home, tmp_path: Path) -> None:
    base = save(small_model(270), byte_tokenizer(["a lunch bag"], num_tokens=270), tmp_path / "b")
    arguments = ["--model", str(base), "--num-tokens", "40", "--min-frequency", "2"]
    result = run(home, "extend", str(base), *arguments)
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout)
    folder = home.models / "extended"
    assert (line["folder"], line["base"], line["model"]) == (str(folder), str(base), str(base))
    assert line["appended"] == 40
    assert line["tokens_saved"] > 0.2
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size >= line["vocab_size"]
    again = run(home, "extend", str(base))
    assert again.exit_code == 0  # a tokenizer alone lies elsewhere
    assert json.loads(again.stdout)["folder"] == str(home.tokenizers / "extended")
    once_more = json.loads(run(home, "extend", str(base)).stdout)
    assert {**once_more, "seconds": 0} == {**json.loads(again.stdout), "seconds": 0}
    other = run(home, "extend", str(base), "--num-tokens", "7")
    assert other.exit_code == 1
    assert other.stderr.startswith(f"Error: {home.tokenizers / 'extended'} exists already, made")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tokenizer", "--from", "lists"], "Error: the corpus has no source 'lists': it has"),
        (["tokenizer", "--vocab-size", "9"], "Error: vocab_size must be at least 320, got 9"),
        (["extend", "nothing"], "Error: there is no tokenizer 'nothing': expected a folder"),
    ],
)
def test_mistakes_are_one_sentence(home: Home, arguments: list[str], sentence: str) -> None:
    result = run(home, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(sentence)
    assert result.stderr.count("\n") == 1


def test_nothing_ingested(tmp_path: Path) -> None:
    result = run(Home(tmp_path), "tokenizer")
    assert result.exit_code == 1
    assert "run `longtrail ingest` first" in result.stderr
