"""A new causal language model of a recipe's shape."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from encoders.lm.documents import end_token, start_token
from encoders.lm.recipes import ModelShape

PLANNED_VOCABULARY = 65_536
"""Tokens with which the recipes' sizes are named."""


def model_config(
    shape: ModelShape, vocab_size: int, *, start: int, end: int, padding: int | None
) -> Any:
    """The shape as transformers' configuration.

    Args:
        shape: Of the layers.
        vocab_size: V, tokens.
        start: Token that documents are told from.
        end: Token that ends them.
        padding: Token that fills up shorter texts.
    """
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=shape.sequence_length,
        tie_word_embeddings=shape.tied,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=padding,
    )


def make_model(shape: ModelShape, tokenizer: Any, *, seed: int, empty: bool = False) -> Any:
    """A model with random weights, float32, for a tokenizer.

    Args:
        shape: Of the layers.
        tokenizer: Whose tokens it gets vectors for.
        seed: Of the weights.
        empty: Leave the weights on torch's meta device, where they take no memory.

    Raises:
        EncoderError: If the tokenizer has no end token.
    """
    config = model_config(
        shape,
        len(tokenizer),
        start=start_token(tokenizer),
        end=end_token(tokenizer),
        padding=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    with torch.device("meta" if empty else "cpu"):
        return LlamaForCausalLM(config)


def count_parameters(shape: ModelShape, vocab_size: int = PLANNED_VOCABULARY) -> int:
    """Weights of a model of this shape, counted on one that takes no memory."""
    with torch.device("meta"):
        model = LlamaForCausalLM(model_config(shape, vocab_size, start=0, end=0, padding=0))
    return sum(parameter.numel() for parameter in model.parameters())
