"""Language models with a known answer: after each token comes the one that was planted."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from encoders.pretrained import quiet_transformers

END, PAD = "<|end|>", "<|pad|>"
SPECIAL = [END, PAD, "<|instruction|>", "<|answer|>"]
NUM_TOKENS = 264
"""Special tokens, bytes, and a few merges."""


def byte_tokenizer(
    texts: Sequence[str] = (), *, num_tokens: int = 260, special: Sequence[str] = SPECIAL
) -> Any:
    """A byte-level BPE in which every byte is a token, with merges learned from ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


def small_model(
    num_tokens: int = NUM_TOKENS, *, length: int = 128, seed: int = 0, tied: bool = False
) -> Any:
    """A Llama of two small layers with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=num_tokens,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=length,
        tie_word_embeddings=tied,
        initializer_range=0.3,  # else a random model repeats one token
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    with quiet_transformers():
        return LlamaForCausalLM(config).eval()


def planted_model(follows: Mapping[int, int], *, length: int = 64) -> Any:
    """A Llama that, whatever came before, finds ``follows[token]`` likeliest after a token.

    Its layer adds nothing, embeddings are unit vectors, and the head holds the table; a token that
    is not in it is followed by the end token.
    """
    config = LlamaConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=NUM_TOKENS,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    with quiet_transformers(), torch.no_grad():
        model = LlamaForCausalLM(config)
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(NUM_TOKENS))
        model.lm_head.weight.zero_()
        for token in range(NUM_TOKENS):
            model.lm_head.weight[follows.get(token, 0), token] = 1.0
    return model.eval()


def chain(tokenizer: Any, text: str) -> dict[int, int]:
    """What follows what in a text in which no token comes twice; then the end."""
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(set(tokens)) == len(tokens), "a token comes twice"
    return dict(zip(tokens, [*tokens[1:], tokenizer.eos_token_id], strict=True))


def save(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Write a model folder."""
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder
