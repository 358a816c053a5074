"""A domain language model's folder goes straight into encode, and is split like any other."""

from pathlib import Path

import numpy as np
import pytest
import torch

from encoders.config import EncoderConfig
from encoders.encode import encode_behaviors
from encoders.fingerprint import describe_encoder
from encoders.lm.model_folder import load_language_model
from encoders.lm.records import LISTING, TITLE
from encoders.split import load_deep_half
from encoders.table import EmbeddingTable
from feature_repo.behavior import hash63
from feature_repo.home import Home
from tests.encoders.lm.planted_models import SPECIAL, byte_tokenizer, save, small_model
from tests.encoders.lm.shop_home import TITLES, make_home

PROMPT = f"{LISTING}{TITLE}{{text}}"
NUM_TOKENS = 300


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return make_home(tmp_path_factory.mktemp("shop"))


@pytest.mark.parametrize("tied", [True, False])
def test_vectors_are_the_states_below_the_split(home: Home, tmp_path: Path, tied: bool) -> None:
    tokenizer = byte_tokenizer(TITLES, num_tokens=NUM_TOKENS, special=[*SPECIAL, LISTING, TITLE])
    folder = save(small_model(NUM_TOKENS, tied=tied), tokenizer, tmp_path / "model")
    config = EncoderConfig(model=str(folder), prompt=PROMPT, max_tokens=64)
    summary = encode_behaviors(home, config)
    assert (summary.manifest.split_layer, summary.manifest.width) == (1, 32)
    assert summary.num_new == summary.num_behaviors

    model, tokenizer = load_language_model(folder)
    table = EmbeddingTable.open(home)
    for title in TITLES[:3]:
        tokens = torch.tensor([tokenizer(PROMPT.format(text=title))["input_ids"]])
        assert tokens[0, :2].tolist() == tokenizer.convert_tokens_to_ids([LISTING, TITLE])
        with torch.inference_mode():
            states = model(tokens, output_hidden_states=True).hidden_states[1]
        row = table.rows(np.array([hash63(title)]))
        np.testing.assert_allclose(table.vectors[row][0], states[0].mean(dim=0).numpy(), atol=1e-5)
    load_deep_half(str(folder), 1)  # compared with the whole model inside

    # What it was made from, and its kept weights, are no part of what it is.
    before = describe_encoder(config).fingerprint
    (folder / "pretraining.json").write_text("{}")
    (folder / "checkpoints" / "step-1").mkdir(parents=True)
    (folder / "checkpoints" / "step-1" / "model.safetensors").touch()
    assert describe_encoder(config).fingerprint == before
