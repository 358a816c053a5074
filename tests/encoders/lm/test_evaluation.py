"""Models stand side by side on the same documents and tasks; what is measured is kept."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from encoders.lm import cli_evaluate, cli_tune
from encoders.lm.corpus import load_corpus
from encoders.lm.corpus_builder import CorpusConfig, build_corpus
from encoders.lm.evaluation import EVALUATION_FILE, EvaluationConfig, evaluate_models
from encoders.lm.evaluation_documents import Evaluation
from encoders.lm.evaluation_report import write_report
from encoders.lm.examples import TaskConfig
from encoders.lm.held_out_documents import draw_documents, texts_to_write
from encoders.lm.intervals import ratio_interval
from encoders.lm.likelihood import measure_likelihood
from encoders.lm.model_folder import load_language_model
from encoders.lm.text_files import FileSource
from feature_repo.command import SentenceGroup, Settings
from feature_repo.errors import EncoderError, MissingStepError
from feature_repo.home import Home
from feature_repo.manifest import load_manifest
from feature_repo.progress import Progress, silent
from tests.encoders.lm.planted_models import byte_tokenizer, save, small_model
from tests.encoders.lm.shop_home import TITLES, make_home

NUM_TOKENS = 300
CONFIG = EvaluationConfig(
    document_bytes=3000,
    tasks=TaskConfig(test_share=0.2, max_test=6, history_lines=4),
    ngram_bytes=20_000,
    speed_rounds=1,
    speed_texts=2,
    speed_characters=150,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A shop with a corpus, and two models of different tokenizers and lengths."""
    root = tmp_path_factory.mktemp("shop")
    home = make_home(root / "home")
    general = root / "general"
    general.mkdir()
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("aeioulmnrst"), size=6)) for _ in range(2000)]
    for number in range(300):
        text = f"{' '.join(random.choice(words, size=20))}."
        (general / f"{number}.txt").write_text(text, encoding="utf-8")
    files = (FileSource(name="prose", kind="general", pattern=str(general / "*.txt")),)
    build_corpus(home, CorpusConfig(sources=("listings", "baskets"), files=files))
    merged = byte_tokenizer(TITLES, num_tokens=NUM_TOKENS)
    save(small_model(NUM_TOKENS, length=128), merged, home.models / "merged")
    save(small_model(264, length=96, seed=1), byte_tokenizer(), home.models / "bytes")
    return home


@pytest.fixture(scope="module")
def evaluation(home: Home) -> Evaluation:
    folders = [home.models / "bytes", home.models / "merged"]
    return evaluate_models(home, folders, CONFIG)


def test_bits_are_those_of_the_likelihood(home: Home, evaluation: Evaluation) -> None:
    held_out = draw_documents(home, load_corpus(home), "test", CONFIG.document_bytes)
    assert set(held_out) == {"listings", "baskets", "prose"}
    for figures in evaluation.models[:2]:
        model, tokenizer = load_language_model(str(figures.folder))
        pooled = []
        for source, documents in held_out.items():
            direct = measure_likelihood(model, tokenizer, documents.texts)
            found = figures.bits_per_byte[source]
            assert found.value == pytest.approx(direct.bits_per_byte, rel=1e-5)
            assert found.num_documents == len(documents.texts)
            assert found.low is not None
            assert found.high is not None
            assert found.low < found.value < found.high
            if documents.kind == "domain":
                pooled.append(direct)
            tokens = sum(len(row) for row in tokenizer(documents.texts)["input_ids"])
            assert figures.fertility[source].tokens == tokens
        bits = sum(part.bits.sum() for part in pooled)
        size = sum(part.num_bytes.sum() for part in pooled)
        assert figures.bits_per_byte["domain"].value == pytest.approx(bits / size, rel=1e-5)
        assert figures.bits_per_byte["general"] == figures.bits_per_byte["prose"]


def test_differences_are_paired_with_the_first(evaluation: Evaluation) -> None:
    first, second, ngram = evaluation.models
    assert (first.name, second.name) == ("bytes", "merged")
    assert ngram.name == "5-gram over the tokens of bytes"
    for source, found in second.bits_per_byte.items():
        zero = first.bits_per_byte[source]
        assert (zero.difference, zero.difference_low, zero.difference_high) == (0, 0, 0)
        assert found.difference == pytest.approx(found.value - zero.value)
        assert found.difference_low is not None
        assert found.difference_high is not None
        assert found.difference_low < found.difference < found.difference_high
    # Records repeat themselves: counting beats random weights by far.
    assert ngram.bits_per_byte["baskets"].value < 0.3 * first.bits_per_byte["baskets"].value


def test_tasks_and_speed_stand_beside(evaluation: Evaluation) -> None:
    first, second, ngram = evaluation.models
    assert set(first.tasks) == set(second.tasks) >= {"title", "query", "next_purchase"}
    assert all(found.model.num <= 6 for found in first.tasks.values())
    assert first.tasks["title"].new is not None
    assert set(first.tasks["next_purchase"].rules) == {"popular", "users_usual"}
    assert first.speed is not None
    assert second.speed is not None
    assert second.speed.characters_per_token > first.speed.characters_per_token
    # 150 characters are more tokens than the first model's 96: all write shorter texts.
    assert first.speed.characters_per_token < 2
    assert (ngram.tasks, ngram.speed, ngram.folder) == ({}, None, None)


def test_what_is_kept_is_not_measured_again(home: Home, evaluation: Evaluation) -> None:
    opened: list[str] = []

    @contextmanager
    def bars(what: str) -> Iterator[Progress]:
        opened.append(what)
        yield silent

    folders = [home.models / "bytes", home.models / "merged"]
    again = evaluate_models(home, folders, CONFIG, bars=bars)
    assert opened == ["speed"]
    assert again.models[1].bits_per_byte == evaluation.models[1].bits_per_byte
    assert again.models[1].tasks == evaluation.models[1].tasks
    assert Evaluation.load(home.evaluations / EVALUATION_FILE, made_by="") == again
    opened.clear()
    changed = replace(CONFIG, document_bytes=2000, speed_rounds=0, ngram_order=0, with_tasks=False)
    evaluate_models(home, folders[:1], changed, bars=bars)
    assert opened == ["bytes: baskets", "bytes: listings", "bytes: prose"]


def test_texts_to_write_cut_no_special_token(home: Home) -> None:
    drawn = draw_documents(home, load_corpus(home), "train", 3000)
    written = texts_to_write(drawn, num=4, characters=30)
    assert len(written) == 4
    assert all(0 < len(text) <= 30 for text in written)
    assert all(text.startswith("<|") for text in written)  # of domain sources
    assert all(text.count("<|") == text.count("|>") for text in written)
    general = {"prose": drawn["prose"]}
    assert texts_to_write(general, num=1, characters=30) == [drawn["prose"].texts[0][:30]]


def test_intervals_by_hand() -> None:
    ones = np.ones(50)
    assert ratio_interval(ones, 2 * ones) == (0.5, 0.5)
    assert ratio_interval(ones[:1], ones[:1]) is None
    values = np.random.default_rng(0).normal(size=400)
    low, high = ratio_interval(values, np.ones(400)) or (0.0, 0.0)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)
    # Four copies of each row that hang together are no more than one.
    four = ratio_interval(np.tile(values, 4), np.ones(1600), groups=[*range(400)] * 4)
    assert four == pytest.approx((low, high), abs=0.3 * error)
    assert ratio_interval(values[:2], np.ones(2), groups=["a", "a"]) is None


def test_the_page_needs_nothing_else(evaluation: Evaluation, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_report(path, evaluation)
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=.http|<script|@import|url\((?!#)", page)
    for model in evaluation.models:
        assert f'<th scope="row">{model.name}</th>' in page
        assert f"{model.bits_per_byte['domain'].value:.4f}" in page
    assert "&lt;|answer|&gt;" in page
    assert "<svg" in page
    write_report(path, evaluation.model_copy(update={"models": evaluation.models[:1]}))
    assert "Less those of" not in path.read_text(encoding="utf-8")


def run(home: Home, *arguments: str) -> Result:
    group = SentenceGroup(commands=[*cli_tune.commands, *cli_evaluate.commands])
    return CliRunner().invoke(group, arguments, obj=Settings(home, "embedded"))


def one_line(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def test_the_commands_print_one_line_each(home: Home, tmp_path: Path) -> None:
    threads = ("--threads", "1", "--cpu")
    tuning = ("--epochs", "0.2", "--max-examples", "20", "--precision", "float32", *threads)
    tuned = one_line(run(home, "tune", "--model", "merged", *tuning))
    assert tuned["folder"] == str(home.models / "merged-tuned")
    assert tuned["held_out_loss_after"] < tuned["held_out_loss_before"]
    again = one_line(run(home, "tune", "--model", "merged", *tuning))
    assert again["steps"] == tuned["steps"]

    written = run(home, "generate", "merged-tuned", "<|listing|>", "--max-tokens", "5", *threads)
    texts = one_line(written)["texts"]
    assert written.stderr.rstrip("\n") == texts[0].rstrip("\n")
    several = one_line(
        run(home, "generate", "merged", "a", "b", "--task", "shelf", "--max-tokens", "3", *threads)
    )
    assert len(several["texts"]) == 2

    report = tmp_path / "report.html"
    small = ("--document-bytes", "2000", "--max-examples", "4", "--speed-rounds", "1", *threads)
    line = one_line(run(home, "evaluate", "--report", str(report), *small))
    # Without names: the last that was made, after what it was made from.
    assert list(line["models"]) == ["merged", "merged-tuned", "5-gram over the tokens of merged"]
    assert report.exists()
    assert line["models"]["merged"]["bits_per_byte"]["domain"] > 0
    assert "next_purchase" in line["models"]["merged-tuned"]["tasks"]


@pytest.mark.parametrize("name", ["tune", "generate", "evaluate"])
def test_help_shows_the_examples_line_by_line(name: str) -> None:
    group = SentenceGroup(commands=[*cli_tune.commands, *cli_evaluate.commands])
    shown = CliRunner().invoke(group, [name, "--help"]).stdout.splitlines()
    first = shown.index("  Examples:") + 1
    assert shown[first].startswith(f"    longtrail lm {name} ")


def test_a_corpus_of_other_tables_is_refused(home: Home, tmp_path: Path) -> None:
    stale = make_home(tmp_path)
    build_corpus(stale, CorpusConfig(sources=("listings",)))
    tables = load_manifest(stale)
    tables.model_copy(update={"source_fingerprint": "other"}).save(stale.manifest)
    model = str(home.models / "bytes")
    for arguments in (["tune", "--model", model], ["evaluate", model]):
        result = run(stale, *arguments)
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1].startswith("Error: the corpus was made of other tab")


def test_sentences(home: Home, tmp_path: Path) -> None:
    empty = Home(tmp_path / "empty")
    for command, wanted in (("tune", "lm average"), ("evaluate", "lm pretrain")):
        result = run(empty, command)
        assert result.exit_code == 1
        assert f"run `longtrail {wanted}` first" in result.stderr
    with pytest.raises(EncoderError, match="at least one model folder, got none"):
        evaluate_models(home, [], CONFIG)
    with pytest.raises(MissingStepError, match="run `longtrail lm corpus` first"):
        evaluate_models(make_home(tmp_path / "new"), [home.models / "bytes"], CONFIG)
    misfit = tmp_path / "misfit"
    save(small_model(270), byte_tokenizer(TITLES, num_tokens=NUM_TOKENS), misfit)
    result = run(home, "evaluate", str(misfit))
    assert result.exit_code == 1
    assert "they do not belong together" in result.stderr
    result = run(home, "generate", "merged", "a" * 500)
    assert result.exit_code == 1
    assert "a prompt must be shorter than the model's 128 tokens" in result.stderr
    for change in ({"document_bytes": 0}, {"ngram_order": -1}):
        with pytest.raises(EncoderError, match="must be at least"):
            EvaluationConfig(**change)  # type: ignore[arg-type]
