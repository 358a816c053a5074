"""An average is the mean, tells what it brings, and is a model like any other."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from encoders.lm.averaging import AVERAGING_FILE, AveragingManifest, average, mean_weights
from encoders.lm.cli_pretrain import commands
from encoders.lm.corpus import load_corpus, manifest_path, read_documents
from encoders.lm.evaluation import evaluate_models
from encoders.lm.likelihood import measure_likelihood
from encoders.lm.pretraining import pretrain
from encoders.lm.validation import ALL
from feature_repo.command import SentenceGroup, Settings
from feature_repo.errors import DataSetError, EncoderError, MissingStepError
from feature_repo.home import Home
from tests.encoders.lm.small_corpus import make_home, small, texts, weights, write_corpus
from tests.encoders.planted import START, manifest


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = make_home(tmp_path_factory.mktemp("home"))
    pretrain(home, small(steps=40, final_share=0.5), threads=1)
    return home


def test_the_mean_is_taken_in_float32(tmp_path: Path) -> None:
    values = ([1.0, 2.0], [3.0, 1024.0], [8.0, 3.0])
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for file, value in zip(files, values, strict=True):
        save_file({"w": torch.tensor(value, dtype=torch.bfloat16)}, file)
    mean = mean_weights(files)["w"]
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, torch.tensor([4.0, 343.0]))


def test_the_average_is_measured_beside_the_single_ones(home: Home) -> None:
    summary = average(home, home.models / "small", validation_bytes=10**9)
    manifest = summary.manifest
    assert summary.folder == home.models / "small-average"
    assert manifest.steps == [27, 33, 40]
    singles = [weights(home.models / "small" / "checkpoints" / f"step-{s}") for s in (27, 33, 40)]
    for name, value in weights(summary.folder).items():
        torch.testing.assert_close(value, torch.stack([w[name] for w in singles]).mean(dim=0))
    model = AutoModelForCausalLM.from_pretrained(summary.folder)
    tokenizer = AutoTokenizer.from_pretrained(summary.folder)
    bits = size = 0.0
    for source, figure in manifest.average.items():
        if source == ALL:
            continue
        texts = read_documents(home, "valid", source)["text"].to_pylist()
        measured = measure_likelihood(model, tokenizer, texts)
        assert measured.bits_per_byte == pytest.approx(figure, rel=1e-4)
        bits, size = bits + measured.bits.sum(), size + measured.num_bytes.sum()
    assert manifest.average[ALL] == pytest.approx(bits / size, rel=1e-4)
    best = min(figures[ALL] for figures in manifest.single.values())
    assert manifest.single[manifest.best_single][ALL] == best
    assert manifest.gain == pytest.approx(best - manifest.average[ALL])
    saved = AveragingManifest.load(summary.folder / AVERAGING_FILE, made_by="test")
    assert saved == manifest
    written = (summary.folder / "model.safetensors").stat().st_mtime_ns
    assert average(home, home.models / "small", validation_bytes=10**9).manifest == manifest
    assert (summary.folder / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(EncoderError, match="small-average exists already, made from other weights"):
        average(home, home.models / "small", last=2)


def test_a_corpus_of_other_tables_is_refused(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    pretrain(home, small(steps=4, num_snapshots=2), threads=1)
    manifest(START, START).save(home.manifest)
    load_corpus(home).model_copy(update={"tables": "others"}).save(manifest_path(home))
    with pytest.raises(MissingStepError, match="the corpus was made of other tables than those"):
        average(home, home.models / "small")
    with pytest.raises(MissingStepError, match="the corpus was made of other tables than those"):
        pretrain(home, small(steps=5), name="later", threads=1)


def test_without_held_out_text_a_model_is_pretrained_but_nothing_is_compared(
    tmp_path: Path,
) -> None:
    home = make_home(tmp_path)
    write_corpus(home, {"listings": {"train": texts()["listings"]["train"]}})
    manifest = pretrain(home, small(steps=4, num_snapshots=2), threads=1).manifest
    assert [found.figures for found in manifest.validations] == [{}, {}]
    model = home.models / "small"
    with pytest.raises(DataSetError, match="the corpus has no documents in its valid split: the"):
        average(home, model)
    with pytest.raises(DataSetError, match="the corpus has no documents in its test split: the d"):
        evaluate_models(home, [model])
    assert [path.name for path in home.models.iterdir()] == ["small"]
    group = SentenceGroup(commands=commands)
    command = ["pretrain", "--steps", "2", "--batch-rows", "1", "--threads", "1", "--cpu"]
    result = CliRunner().invoke(group, command, obj=Settings(home, "embedded"))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["valid_bits_per_byte"] == {}


def test_sentences(home: Home, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="keeps the weights of 3 steps, 4 were asked for"):
        average(home, home.models / "small", last=4)
    with pytest.raises(EncoderError, match="keeps the weights of 0 steps, 0 were asked for"):
        average(home, home.models / "small-average")


def test_the_command_takes_the_model_pretrained_last(home: Home) -> None:
    group = SentenceGroup(commands=commands)
    result = CliRunner().invoke(
        group,
        ["average", "--last", "2", "--threads", "1", "--name", "two"],
        obj=Settings(home, "embedded"),
    )
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout)
    assert (line["model"], line["steps"]) == ("two", [33, 40])
    assert set(line["single_bits_per_byte"]) == {"33", "40"}
    assert set(line["average_bits_per_byte"]) == {"listings", "baskets", "prose", "all"}
    assert ("Note: the weights of step" in result.stderr) == (line["gain_bits_per_byte"] <= 0)
    empty = CliRunner().invoke(
        group, ["average"], obj=Settings(Home(home.root / "empty"), "embedded")
    )
    assert empty.exit_code == 1
    assert "has no such model yet: run `longtrail lm pretrain` first" in empty.stderr
