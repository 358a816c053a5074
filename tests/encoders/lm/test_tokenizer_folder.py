"""Tokenizers by name and by folder."""

from pathlib import Path

import pytest

from encoders.lm.tokenizer_folder import find_tokenizer, read_tokenizer
from feature_repo.errors import EncoderError
from feature_repo.home import Home
from tests.encoders.lm.planted_models import byte_tokenizer


def test_names_come_before_folders(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    for folder in (home.tokenizers / "mine", tmp_path / "other"):
        byte_tokenizer().save_pretrained(folder)
    assert find_tokenizer(home, "mine") == home.tokenizers / "mine"
    assert find_tokenizer(home, str(tmp_path / "other")) == tmp_path / "other"
    assert len(read_tokenizer(tmp_path / "other")) == 260
    with pytest.raises(EncoderError, match=r"no tokenizer 'yours': .* of this home's \(mine\)"):
        find_tokenizer(home, "yours")
    with pytest.raises(EncoderError, match="none yet: run `longtrail lm tokenizer`"):
        find_tokenizer(Home(tmp_path / "new"), "mine")


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    with pytest.raises(EncoderError, match=f"the tokenizer in {tmp_path} cannot be loaded: "):
        read_tokenizer(tmp_path)
