"""Recipes have the sizes of their names; configurations refuse what does not fit together."""

from dataclasses import replace
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from encoders.lm.model import PLANNED_VOCABULARY, count_parameters, make_model
from encoders.lm.recipes import RECIPES, LearningConfig, ModelShape, PretrainingConfig
from feature_repo.errors import EncoderError
from tests.encoders.lm.planted_models import byte_tokenizer
from tests.encoders.lm.small_corpus import small


@pytest.mark.parametrize(("name", "billions"), [("1b", 1.0), ("7b", 7.0), ("13b", 13.0)])
def test_large_recipes_are_as_large_as_their_names(name: str, billions: float) -> None:
    number = count_parameters(RECIPES[name]().shape, PLANNED_VOCABULARY)
    assert number == pytest.approx(billions * 1e9, rel=0.03)


def test_every_recipe_can_be_counted_and_names_itself() -> None:
    for name, recipe in RECIPES.items():
        assert recipe().recipe == name
    shape = small().shape
    tokenizer = byte_tokenizer()
    model = make_model(shape, tokenizer, seed=0)
    assert isinstance(model, LlamaForCausalLM)
    assert model.num_parameters() == count_parameters(shape, len(tokenizer))
    # By hand: embeddings, two norms, attention with half the keys, SwiGLU, the last norm.
    layer = 2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    assert model.num_parameters() == 260 * 32 + 2 * layer + 32


def test_the_model_knows_its_tokens_and_its_length() -> None:
    tokenizer = byte_tokenizer()
    config = make_model(small().shape, tokenizer, seed=0).config
    assert (config.eos_token_id, config.pad_token_id) == (0, 1)
    assert config.max_position_embeddings == 32
    assert config.tie_word_embeddings
    one, same, other = (make_model(small().shape, tokenizer, seed=s) for s in (3, 3, 4))
    weights = [m.model.layers[0].mlp.up_proj.weight for m in (one, same, other)]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_size": 0}, "hidden_size must be above 0, got 0"),
        ({"hidden_size": 36}, "hidden_size must be a multiple of twice num_heads"),
        ({"num_key_value_heads": 3}, "num_heads must be a multiple of num_key_value_heads"),
    ],
)
def test_shapes_are_checked(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EncoderError, match=sentence):
        replace(small().shape, **change)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": None}, "a training takes either steps or minutes"),
        ({"minutes": 1.0}, "a training takes either steps or minutes"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_rows": 0}, "batch_rows must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"final_share": 1.5}, r"final_share must be in \[0, 1\], got 1.5"),
        ({"precision": "float8"}, "precision must be one of float32, bfloat16, got 'float8'"),
        ({"num_snapshots": -1}, "num_snapshots must be at least 0, got -1"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, muon, got 'sgd'"),
        ({"optimizer": "muon", "sharded": True}, "muon needs whole matrices"),
    ],
)
def test_learning_is_checked(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EncoderError, match=sentence):
        replace(LearningConfig(steps=3), **change)


def test_pretraining_is_checked() -> None:
    shape = ModelShape(32, 64, 1, 2, 1, 16)
    for change, sentence in (
        ({"general_share": 2.0}, r"general_share must be in \[0, 1\], got 2.0"),
        ({"validation_bytes": 0}, "validation_bytes must be above 0, got 0"),
    ):
        with pytest.raises(EncoderError, match=sentence):
            replace(PretrainingConfig("x", shape, LearningConfig(steps=1)), **change)
