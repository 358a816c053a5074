"""A merged model lies between two of the same kind; others are refused."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from encoders.lm.cli_pretrain import commands
from encoders.lm.merging import MERGING_FILE, MergingManifest, merge
from encoders.lm.model_folder import load_language_model
from feature_repo.command import SentenceGroup, Settings
from feature_repo.errors import EncoderError
from feature_repo.home import Home
from tests.encoders.lm.planted_models import byte_tokenizer, save, small_model
from tests.encoders.lm.small_corpus import weights

_TEXTS = ["red mug", "blue mug"] * 3


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    for seed, name in enumerate(("base", "tuned")):
        save(small_model(seed=seed), byte_tokenizer(), home.models / name)
    return home


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_every_weight_lies_between(home: Home, weight: float) -> None:
    base, tuned = home.models / "base", home.models / "tuned"
    summary = merge(home, base, tuned, weight=weight, name="merged")
    merged, ours, theirs = weights(summary.folder), weights(base), weights(tuned)
    assert merged.keys() == ours.keys()
    for name, value in merged.items():
        torch.testing.assert_close(value, (1 - weight) * ours[name] + weight * theirs[name])
    saved = MergingManifest.load(summary.folder / MERGING_FILE, made_by="test")
    assert saved == summary.manifest
    assert (saved.weight, saved.base_model) == (weight, str(base))
    model, tokenizer = load_language_model(summary.folder)
    assert len(tokenizer) <= model.get_input_embeddings().num_embeddings


def test_the_same_again_does_nothing_and_another_is_refused(home: Home) -> None:
    base, tuned = home.models / "base", home.models / "tuned"
    made = merge(home, base, tuned, weight=0.5)
    written = (made.folder / "model.safetensors").stat().st_mtime_ns
    assert merge(home, base, tuned, weight=0.5).manifest == made.manifest
    assert (made.folder / "model.safetensors").stat().st_mtime_ns == written
    for other in ({"base": base, "weight": 0.4}, {"base": tuned, "weight": 0.5}):
        with pytest.raises(EncoderError, match="tuned-merged exists already, made from other mod"):
            merge(home, tuned=tuned, **other)  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused(home: Home) -> None:
    base = home.models / "base"
    wide = save(small_model(num_tokens=300), byte_tokenizer(), home.models / "wide")
    with pytest.raises(EncoderError, match=r"not of the same shape: lm_head\.weight has \[264, 32"):
        merge(home, base, wide, weight=0.5)
    other = byte_tokenizer(_TEXTS, num_tokens=262)
    words = save(small_model(), other, home.models / "words")
    with pytest.raises(EncoderError, match="have different tokenizers, so that their weights mean"):
        merge(home, base, words, weight=0.5)
    with pytest.raises(EncoderError, match=r"must be in \[0, 1\], got 1.5"):
        merge(home, base, base, weight=1.5)
    with pytest.raises(EncoderError, match="tuned exists already, made from other models or with"):
        merge(home, base, home.models / "tuned", weight=0.5, name="tuned")
    assert sorted(path.name for path in home.models.iterdir()) == ["base", "tuned", "wide", "words"]


def test_the_command(home: Home) -> None:
    group = SentenceGroup(commands=commands)
    result = CliRunner().invoke(
        group, ["merge", "base", "tuned", "--weight", "0.25"], obj=Settings(home, "embedded")
    )
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout)
    assert (line["model"], line["weight"]) == ("tuned-merged", 0.25)
    missing = CliRunner().invoke(group, ["merge", "base", "nobody"], obj=Settings(home, "embedded"))
    assert missing.exit_code == 1
    assert "nobody" in missing.stderr
