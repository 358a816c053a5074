"""``lm corpus`` as users meet it."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from encoders.lm.cli_corpus import commands
from encoders.lm.corpus import MixtureConfig, load_corpus
from feature_repo.command import SentenceGroup, Settings
from feature_repo.home import Home
from tests.encoders.lm.planted_shop import make_shop


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_shop(tmp_path / "home")


def run(home: Home, *arguments: str) -> Any:
    group = SentenceGroup(commands=commands)
    return CliRunner().invoke(group, ["corpus", *arguments], obj=Settings(home, "embedded"))


def test_it_prints_one_line(home: Home, tmp_path: Path) -> None:
    reviews = tmp_path / "reviews.jsonl"
    rows = [{"body": f"The {n} plates are nice, and came within {n} days."} for n in range(99)]
    rows.append({"body": "Die Teller sind schön und kamen nach wenigen Tagen an."})
    reviews.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        *("--built-in", "listings", "--built-in", "baskets"),
        *("--source", f"reviews=general:{reviews}", "--text-column", "body"),
        *("--language", "en", "--near-duplicates", "1", "--weight", "baskets=2"),
        *("--general-share", "0.5", "--temperature", "3"),
    ]
    result = run(home, *arguments)
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout)
    assert line["folder"] == str(home.corpus)
    assert set(line["documents"]) == {"listings", "baskets", "reviews"}
    assert line["until"] == "2024-03-21T00:00:00+00:00"
    assert line["dropped"]["reviews"] == {"language": 1}
    assert line["train_bytes"]["reviews"] > 1000
    manifest = load_corpus(home)
    assert line["fingerprint"] == manifest.fingerprint
    assert manifest.mixture.model_dump() == {
        "general_share": 0.5,
        "temperature": 3.0,
        "weights": {"baskets": 2.0},
    }
    assert manifest.options["filters"]["near_duplicates"] is None
    again = json.loads(run(home, *arguments).stdout)
    assert again["fingerprint"] == line["fingerprint"]


def test_without_options_the_mixture_is_the_default_one(home: Home) -> None:
    assert run(home, "--built-in", "baskets").exit_code == 0
    assert load_corpus(home).mixture == MixtureConfig()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--source", "logs"], "Error: a source is named as NAME=KIND:GLOB, such as"),
        (["--source", "logs=domain:/nowhere/*.txt"], "Error: source logs: no file matches"),
        (["--weight", "baskets"], "Error: --weight must be SOURCE=FACTOR, such as listings=2, got"),
        (["--weight", "lists=2"], "Error: the mixture weighs 'lists', but the corpus has the"),
    ],
)
def test_mistakes_are_one_sentence(home: Home, arguments: list[str], sentence: str) -> None:
    result = run(home, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(sentence)
    assert result.stderr.count("\n") == 1
    assert not home.corpus.exists()
