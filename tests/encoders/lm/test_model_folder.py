"""Model folders are found by name or path, loaded whole, and refused where they do not fit."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from encoders.lm.model_folder import (
    PRETRAINING_FILE,
    check_model_name,
    find_language_model,
    latest_model,
    load_language_model,
    save_language_model,
)
from feature_repo.errors import EncoderError, MissingStepError
from feature_repo.home import Home
from tests.encoders.lm.planted_models import byte_tokenizer, save, small_model


def test_models_are_found_by_name_and_by_folder(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    made = save(small_model(), byte_tokenizer(), home.models / "made")
    elsewhere = save(small_model(), byte_tokenizer(), tmp_path / "elsewhere")
    assert find_language_model(home, "made") == made
    assert find_language_model(home, str(elsewhere)) == elsewhere
    (tmp_path / "empty").mkdir()
    with pytest.raises(EncoderError, match=r"has no config\.json"):
        find_language_model(home, str(tmp_path / "empty"))


def test_the_latest_is_the_one_written_last(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with pytest.raises(MissingStepError, match="has no such model yet: run `longtrail lm x` first"):
        latest_model(home, PRETRAINING_FILE, made_by="longtrail lm x")
    for seconds, name in enumerate(("b", "c", "a", "unfinished.part")):
        folder = home.models / name
        folder.mkdir(parents=True)
        (folder / PRETRAINING_FILE).touch()
        os.utime(folder / PRETRAINING_FILE, (seconds, seconds))
    (home.models / "other").mkdir()
    assert latest_model(home, PRETRAINING_FILE, made_by="x").name == "a"


def test_a_folder_comes_back_whole(tmp_path: Path) -> None:
    model, tokenizer = small_model(), byte_tokenizer()
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    save_language_model(model, tokenizer, tmp_path / "plain")
    save_language_model(model, tokenizer, tmp_path / "zeros", zeros)
    loaded, its_tokenizer = load_language_model(tmp_path / "plain")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert not loaded.training
    assert its_tokenizer("mug")["input_ids"] == tokenizer("mug")["input_ids"]
    assert not load_language_model(tmp_path / "zeros")[0].lm_head.weight.any()


def test_an_empty_model_has_the_shapes_alone(tmp_path: Path) -> None:
    model = small_model(tied=True)
    save_language_model(model.bfloat16(), byte_tokenizer(), tmp_path / "made")
    whole, _ = load_language_model(tmp_path / "made")
    empty, tokenizer = load_language_model(tmp_path / "made", empty=True)
    parameters = dict(empty.named_parameters())
    assert {p.device.type for p in parameters.values()} == {"meta"}
    assert [(n, p.shape, p.dtype) for n, p in parameters.items()] == [
        (n, p.shape, p.dtype) for n, p in whole.named_parameters()
    ]
    assert [(n, b.shape, b.dtype) for n, b in empty.named_buffers()] == [
        (n, b.shape, b.dtype) for n, b in whole.named_buffers()
    ]
    assert len(tokenizer) == 260
    (tmp_path / "made" / "config.json").write_text("{}")
    with pytest.raises(EncoderError, match="cannot be loaded"):
        load_language_model(tmp_path / "made", empty=True)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = save(small_model(num_tokens=200), byte_tokenizer(), tmp_path / "misfit")
    with pytest.raises(EncoderError, match="has 260 tokens, its model vectors for 200"):
        load_language_model(folder)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    endless = save(small_model(), tokenizer, tmp_path / "endless")
    with pytest.raises(EncoderError, match="has no end token"):
        load_language_model(endless)
    weights = load_file(endless / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, endless / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"lacks 1 of its weights, the first is lm_head\.weight"):
        load_language_model(endless)
    for name in ("", "a/b", "..", "x.part"):
        with pytest.raises(EncoderError, match="must be a plain file name"):
            check_model_name(name)
