"""Whatever changes a vector changes the fingerprint; nothing else does."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from encoders.config import DEFAULT_MODEL, EncoderConfig
from encoders.fingerprint import describe_encoder
from feature_repo.errors import EncoderError
from feature_repo.manifest import EncoderManifest


@pytest.fixture
def config(bert_folder: Path) -> EncoderConfig:
    return EncoderConfig(model=str(bert_folder))


@pytest.mark.parametrize(
    "change",
    [
        {"split_layer": 1},
        {"pooling": "last"},
        {"pooling": "first"},
        {"prompt": "query: {text}"},
        {"normalize": True},
        {"dtype": "bfloat16"},
        {"max_tokens": 32},
    ],
    ids=str,
)
def test_each_setting_changes_it(config: EncoderConfig, change: dict[str, Any]) -> None:
    before = describe_encoder(config)
    after = describe_encoder(dataclasses.replace(config, **change))
    assert after.fingerprint != before.fingerprint
    assert after.model_fingerprint == before.model_fingerprint


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_each_file_of_the_model_changes_it(
    config: EncoderConfig, tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(config.model, tmp_path / "model"))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content + b" ")
    before = describe_encoder(config)
    after = describe_encoder(dataclasses.replace(config, model=str(folder)))
    assert after.model_fingerprint != before.model_fingerprint
    assert after.fingerprint != before.fingerprint


def test_place_reading_matter_and_speed_settings_do_not(
    config: EncoderConfig, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(config.model, tmp_path / "moved"))
    (folder / "README.md").write_text("other words", encoding="utf-8")
    moved = dataclasses.replace(config, model=str(folder), batch_tokens=64, part_texts=10)
    assert describe_encoder(moved).fingerprint == describe_encoder(config).fingerprint


def test_the_default_split_is_written_out(config: EncoderConfig) -> None:
    manifest = describe_encoder(config)
    assert (manifest.split_layer, manifest.width, manifest.model) == (2, 16, config.model)
    explicit = describe_encoder(dataclasses.replace(config, split_layer=2))
    assert explicit == manifest


def test_the_default_encoder_is_known_by_its_package() -> None:
    manifest = describe_encoder(EncoderConfig())
    assert (manifest.model, manifest.split_layer, manifest.width) == (DEFAULT_MODEL, 3, 384)
    assert EncoderManifest.model_validate_json(manifest.model_dump_json()) == manifest


@pytest.mark.parametrize("split_layer", [0, 5])
def test_a_split_layer_out_of_range_is_one_sentence(
    config: EncoderConfig, split_layer: int
) -> None:
    with pytest.raises(EncoderError, match=rf"in \[1, 4\] .*got {split_layer}$"):
        describe_encoder(dataclasses.replace(config, split_layer=split_layer))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pooling": "max"}, "pooling must be one of mean, last, first, got 'max'"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, got 'int8'"),
        ({"prompt": "no place"}, "prompt must hold {text} exactly once, got 'no place'"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"part_texts": 0}, "part_texts must be at least 1, got 0"),
    ],
    ids=str,
)
def test_bad_settings_name_what_is_allowed(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EncoderError) as raised:
        EncoderConfig(**change)
    assert str(raised.value) == sentence
