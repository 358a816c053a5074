"""How fast models write the same text: characters per second, token by token.

Left to themselves two models would write different texts of different lengths. Here each writes the
texts that it is given, as it would write them if they were its own: one token at a time, keys and
values kept, the likeliest next token looked up, and then the text's own next token taken. So the
figure holds the model's arithmetic and its tokenizer's length, and nothing else.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache

from encoders.lm.documents import start_token
from encoders.lm.fertility import token_ids
from feature_repo.errors import EncoderError
from feature_repo.progress import Progress, silent


@dataclass(frozen=True)
class Speed:
    """One model's speed over some rounds of the same texts."""

    num_characters: int
    """Of a round."""
    num_tokens: int
    """Of a round, in this model's tokens."""
    seconds: list[float]
    """Of each round."""

    @property
    def characters_per_s(self) -> float:
        """Of the median round."""
        return self.num_characters / median(self.seconds)

    @property
    def tokens_per_s(self) -> float:
        """Of the median round."""
        return self.num_tokens / median(self.seconds)

    @property
    def characters_per_token(self) -> float:
        """What a step is worth."""
        return self.num_characters / self.num_tokens


def measure_speeds(
    models: Mapping[str, tuple[Any, Any]],
    texts: Sequence[str],
    *,
    rounds: int = 3,
    progress: Progress = silent,
) -> dict[str, Speed]:
    """Let every model write the same texts, in turn, so that a busy machine slows all of them.

    Args:
        models: Name -> (causal model, its tokenizer).
        texts: Each shorter than every model's length in its tokens.
        rounds: Times that every model writes every text; one more before warms up.
        progress: Told texts.

    Raises:
        EncoderError: If a text does not fit a model, or there is none.
    """
    if not any(texts):
        raise EncoderError("measuring the speed of generation needs at least one text, got none")
    rows = {name: _tokens(model, tokenizer, texts) for name, (model, tokenizer) in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    total = (rounds + 1) * len(models) * len(texts)
    for number in range(rounds + 1):
        for name, (model, _) in models.items():
            began = time.perf_counter()
            for row in rows[name]:
                _write(model, row)
                progress(1, total)
            if number:
                seconds[name].append(time.perf_counter() - began)
    num_characters = sum(map(len, texts))
    return {
        # Without the start token, which is not written.
        name: Speed(num_characters, sum(len(row) - 1 for row in rows[name]), seconds[name])
        for name in models
    }


def _tokens(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    start = start_token(tokenizer)
    rows = [[start, *row] for row in token_ids(tokenizer, texts)]
    longest: int = model.config.max_position_embeddings
    if max(map(len, rows)) > longest:
        raise EncoderError(
            f"a text of {max(map(len, rows))} tokens does not fit a model of {longest}: measure "
            "the speed on shorter texts"
        )
    return rows


@torch.inference_mode()
def _write(model: Any, row: Sequence[int]) -> None:
    """Write the tokens of a row after its first."""
    cache = DynamicCache(config=model.config)
    for token in row[:-1]:
        step = torch.tensor([[token]], device=model.device)
        logits = model(input_ids=step, past_key_values=cache, use_cache=True).logits
        logits[0, -1].argmax().item()  # what greedy decoding waits for
