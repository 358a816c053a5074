"""Pretraining learns, and writes a folder that others read."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from encoders.config import EncoderConfig
from encoders.fingerprint import describe_encoder
from encoders.lm.cli_pretrain import commands
from encoders.lm.corpus import read_documents
from encoders.lm.likelihood import measure_likelihood
from encoders.lm.pretraining import pretrain
from encoders.lm.pretraining_manifest import PretrainingManifest
from encoders.lm.validation import ALL
from encoders.split import load_deep_half, load_shallow_half
from encoders.text_encoder import TextEncoder
from feature_repo.command import SentenceGroup, Settings
from feature_repo.errors import EncoderError, MissingStepError
from feature_repo.home import Home
from tests.encoders.lm.planted_models import byte_tokenizer, save, small_model
from tests.encoders.lm.small_corpus import (
    assert_equal_weights,
    make_home,
    small,
    texts,
    weights,
    write_corpus,
    write_tokenizer,
)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "home")


def test_a_model_learns_and_its_folder_is_complete(home: Home) -> None:
    told: list[dict[str, float]] = []
    summary = pretrain(
        home, small(steps=40), threads=1, learning=lambda *_, **figures: told.append(figures)
    )
    folder, manifest = summary.folder, summary.manifest
    assert folder == home.models / "small"
    assert PretrainingManifest.load(folder / "pretraining.json", made_by="test") == manifest
    first, last = manifest.validations[0].figures, manifest.validations[-1].figures
    assert set(last) == {"listings", "baskets", "prose", ALL}
    assert last["listings"] < first["listings"] < 5
    assert manifest.curve[-1].loss < manifest.curve[0].loss - 1
    assert (manifest.steps, len(manifest.curve), manifest.snapshots) == (40, 40, [27, 33, 40])
    # Room for one more token of each of three sources in every batch; the last are cut off.
    assert manifest.num_tokens == pytest.approx(40 * (8 * 32 - 3), abs=3)
    assert sum(manifest.mixture.values()) == pytest.approx(1)
    assert 0 < manifest.matmul_share < 1
    assert told[-1]["loss"] < told[1]["loss"]
    assert [path.name for path in home.models.iterdir()] == ["small"]

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    valid = read_documents(home, "valid", "listings")["text"].to_pylist()
    measured = measure_likelihood(model, tokenizer, valid)
    everything = replace(small(steps=40), validation_bytes=10**9)
    whole = pretrain(home, everything, name="all", threads=1).manifest
    assert measured.bits_per_byte == pytest.approx(
        whole.validations[-1].figures["listings"], rel=1e-4
    )
    # The snapshots are weights on the way; the last are the model's.
    assert_equal_weights(folder, folder / "checkpoints" / "step-40")
    early = AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "step-27")
    assert not torch.equal(early.lm_head.weight, model.lm_head.weight)


def test_the_shares_of_bytes_become_shares_of_tokens(home: Home) -> None:
    config = replace(small(steps=1), general_share=0.5)
    manifest = pretrain(home, config, threads=1).manifest
    tokenizer = AutoTokenizer.from_pretrained(home.tokenizers / "domain")
    train = {source: splits["train"] for source, splits in texts().items()}
    per_byte = {
        source: sum(len(row) + 1 for row in tokenizer(rows)["input_ids"])
        / sum(len(text.encode()) for text in rows)
        for source, rows in train.items()
    }
    raw = {"prose": 0.5 * per_byte["prose"]}
    # Of temperature 2, the default.
    sizes = {s: sum(len(t.encode()) for t in train[s]) ** 0.5 for s in ("listings", "baskets")}
    for source, size in sizes.items():
        raw[source] = 0.5 * size / sum(sizes.values()) * per_byte[source]
    for source, share in manifest.mixture.items():
        assert share == pytest.approx(raw[source] / sum(raw.values()))


def test_the_folder_goes_into_encode(home: Home) -> None:
    folder = pretrain(home, small(steps=4), threads=1).folder
    description = describe_encoder(EncoderConfig(model=str(folder), max_tokens=16))
    vectors = TextEncoder.load(description).encode(["red mug", "a longer text than that", "mug"])
    assert vectors.shape == (3, 32)
    assert np.isfinite(vectors).all()
    # Padding is not seen: each alone gives the same.
    alone = TextEncoder.load(description).encode(["mug"])
    np.testing.assert_allclose(vectors[2], alone[0], rtol=1e-4, atol=1e-5)
    load_shallow_half(str(folder), 1)
    load_deep_half(str(folder), 1)


def test_minutes_become_steps_once(home: Home) -> None:
    config = small(steps=None, minutes=0.02, checkpoint_steps=1)

    class Killed(BaseException):
        pass

    totals: list[int] = []

    def kill(advance: int, total: int, **figures: float) -> None:
        totals.append(total)
        if figures:
            raise Killed

    with pytest.raises(Killed):
        pretrain(home, config, name="timed", threads=1, learning=kill)
    state = json.loads((home.models / "timed.checkpoint.part" / "state.json").read_text())
    assert (state["step"], state["num_steps"]) == (0, totals[0])
    assert totals[0] > 5
    manifest = pretrain(home, config, name="timed", threads=1).manifest
    assert manifest.steps == totals[0]
    fixed = pretrain(home, small(steps=totals[0]), name="fixed", threads=1)
    # The trial left nothing behind: the same steps, given as such, end with the same weights.
    assert_equal_weights(fixed.folder, home.models / "timed")


def test_a_model_goes_on_with_a_tenth_of_the_rate_and_half_general_text(
    home: Home, tmp_path: Path
) -> None:
    base = pretrain(home, small(steps=30), threads=1)
    going_on = pretrain(home, small(steps=6), base="small", threads=1)
    manifest = going_on.manifest
    assert going_on.folder.name == "small-continued"
    assert manifest.base_model == str(base.folder)
    assert manifest.config["learning"]["learning_rate"] == pytest.approx(1e-3)
    assert manifest.config["general_share"] == 0.5
    assert manifest.curve[0].loss < base.manifest.curve[0].loss - 1
    other = save(small_model(length=16), byte_tokenizer(), tmp_path / "other")
    far = pretrain(home, small(steps=1), base=str(other), name="far", threads=1)
    assert far.manifest.vocab_size == 264
    assert far.manifest.config["learning"]["learning_rate"] == pytest.approx(1e-3)
    expected = asdict(replace(small().shape, sequence_length=16, tied=False))
    assert far.manifest.config["shape"] == expected
    assert far.manifest.tokenizer != manifest.tokenizer


def test_what_goes_on_learns_as_it_was_pretrained(home: Home) -> None:
    recipe = small(steps=2, learning_rate=4e-3, optimizer="muon")
    first = replace(recipe, shape=replace(recipe.shape, sequence_length=16))
    assert pretrain(home, first, name="first", threads=1).manifest.config == json.loads(
        json.dumps(asdict(first))
    )
    wide = replace(small(steps=2), shape=replace(recipe.shape, hidden_size=64, num_layers=3))
    for base, name in (("first", "second"), ("second", "third")):
        config = pretrain(home, wide, name=name, base=base, threads=1).manifest.config
        assert config["learning"]["learning_rate"] == pytest.approx(4e-4)
        assert config["learning"]["optimizer"] == "muon"
        assert config["shape"] == asdict(first.shape)
    own = replace(wide, learning=replace(wide.learning, learning_rate=7e-3))
    told = ("learning_rate", "optimizer")
    made = pretrain(home, own, name="own", base="first", explicit=told, threads=1).manifest
    assert [made.config["learning"][name] for name in told] == [7e-3, "adamw"]
    assert made.num_tokens == pytest.approx(2 * (8 * 16 - 3), abs=6)


def test_the_same_again_does_nothing_and_other_settings_are_refused(home: Home) -> None:
    first = pretrain(home, small(steps=2), threads=1)
    written = (first.folder / "model.safetensors").stat().st_mtime_ns
    again = pretrain(home, small(steps=2), threads=1)
    assert again.manifest == first.manifest
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(EncoderError, match=r"another model 'small' in .*: give another --name"):
        pretrain(home, small(steps=3), threads=1)


def test_gradients_of_several_passes_add_up_and_layers_may_be_computed_again(home: Home) -> None:
    plain = pretrain(home, small(steps=3, pass_rows=8), name="plain", threads=1)
    for name, change in (
        ("passes", {"pass_rows": 3}),
        ("again", {"pass_rows": 8, "checkpoint_activations": True}),
    ):
        other = pretrain(home, small(steps=3, **change), name=name, threads=1)
        for key, value in weights(plain.folder).items():
            torch.testing.assert_close(
                weights(other.folder)[key], value, rtol=1e-2, atol=1e-3, msg=key
            )


def test_sentences(home: Home, tmp_path: Path) -> None:
    empty = Home(tmp_path / "empty")
    write_tokenizer(empty)
    with pytest.raises(MissingStepError, match="run `longtrail lm corpus` first"):
        pretrain(empty, small(), threads=1)
    with pytest.raises(EncoderError, match="there is no tokenizer 'none'"):
        pretrain(home, small(), tokenizer="none", threads=1)
    with pytest.raises(EncoderError, match=r"must be a plain file name, got '\.\./x'"):
        pretrain(home, small(), name="../x", threads=1)
    with pytest.raises(EncoderError, match=r"the loss became .* in step .*: lower --learning-rate"):
        pretrain(home, small(learning_rate=1e30), threads=1)
    model = small_model(num_tokens=200)
    folder = save(model, byte_tokenizer(), tmp_path / "misfit")
    with pytest.raises(EncoderError, match="has 260 tokens, its model vectors for 200: they do no"):
        pretrain(home, small(), base=str(folder), threads=1)
    write_corpus(home, {"listings": {"valid": ["mug"]}}, fingerprint="no training text")
    with pytest.raises(ValueError, match="no source of the corpus has training text"):
        pretrain(home, small(), threads=1)
    assert not list(home.models.glob("*"))


def test_the_command_prints_one_line(home: Home) -> None:
    group = SentenceGroup(commands=commands)
    arguments = ["pretrain", "--steps", "2", "--batch-rows", "1", "--threads", "1", "--cpu"]
    arguments += ["--precision", "float32", "--track", "tensorboard", "--name", "first"]
    result = CliRunner().invoke(group, arguments, obj=Settings(home, "embedded"))
    assert result.exit_code == 0, result.output
    line: dict[str, Any] = json.loads(result.stdout)
    assert (line["model"], line["steps"], line["recipe"]) == ("first", 2, "tiny")
    assert set(line["valid_bits_per_byte"]) == {"listings", "baskets", "prose", "all"}
    assert "Next: longtrail lm average first" in result.stderr
    assert list((home.root / "tracking" / "first").glob("events.*"))
    # What goes on learns by the recipe that its folder names, what the user says comes first.
    path = home.models / "first" / "pretraining.json"
    told = PretrainingManifest.load(path, made_by="test").model_copy(update={"recipe": "1b"})
    told.save(path)
    arguments = ["pretrain", "--model", "first", "--steps", "1", "--batch-rows", "1", "--cpu"]
    arguments += ["--threads", "1", "--precision", "float32", "--no-compile"]
    arguments += ["--optimizer", "adamw", "--learning-rate", "5e-4"]
    result = CliRunner().invoke(group, arguments, obj=Settings(home, "embedded"))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["recipe"] == "1b"
    path = home.models / "first-continued" / "pretraining.json"
    config = PretrainingManifest.load(path, made_by="test").config
    assert config["learning"]["learning_rate"] == 5e-4
    assert (config["shape"]["hidden_size"], config["shape"]["sequence_length"]) == (256, 256)
    both = CliRunner().invoke(
        group,
        ["pretrain", "--steps", "2", "--minutes", "1"],
        obj=Settings(home, "embedded"),
    )
    assert both.exit_code == 1
    assert both.stderr == "Error: give --minutes or --steps, not both\n"
