"""A language model writes: greedy or sampled, many prompts at once, keys and values kept.

Shapes: B = prompts, P = tokens of the longest prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from encoders.lm.documents import end_token, start_token
from encoders.lm.fertility import token_ids
from encoders.pretrained import quiet_transformers
from feature_repo.errors import EncoderError
from feature_repo.progress import Progress, silent


@dataclass(frozen=True)
class GenerationOptions:
    """How tokens are chosen, and when a text ends.

    Raises:
        EncoderError: If a value is outside its range.
    """

    max_tokens: int = 64
    """Written at most; fewer where the end token comes, or the model's length is reached."""
    temperature: float = 0.0
    """Logits are divided by it before one is drawn; 0 = always the likeliest token."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that hold this much probability, in (0, 1]."""
    seed: int = 0
    """Of the draws."""
    batch_texts: int = 32
    """Prompts continued at once; moves speed and memory only."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_texts"):
            if getattr(self, name) < 1:
                raise EncoderError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.temperature < float("inf"):
            raise EncoderError(f"temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise EncoderError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.seed < 0:
            raise EncoderError(f"seed must be at least 0, got {self.seed}")


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    options: GenerationOptions = GenerationOptions(),  # immutable
    *,
    on_text: Callable[[str], None] | None = None,
    progress: Progress = silent,
) -> list[str]:
    """Continue every prompt until its end token; see :func:`generate_after`.

    Args:
        model: With a head over the vocabulary (``AutoModelForCausalLM``).
        tokenizer: The model's.
        prompts: N texts.
        options: How.
        on_text: Told every piece of the one prompt's continuation as soon as its characters are
            whole; needs exactly one prompt.
        progress: Told prompts.

    Raises:
        EncoderError: If a prompt fills the model's length, or the tokenizer has no end token.
    """
    rows = token_ids(tokenizer, prompts)
    return generate_after(model, tokenizer, rows, options, on_text=on_text, progress=progress)


def generate_after(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions = GenerationOptions(),  # immutable
    *,
    on_text: Callable[[str], None] | None = None,
    progress: Progress = silent,
) -> list[str]:
    """Continue prompts that are tokens already.

    A prompt's continuation depends on the others only by rounding; drawn ones also on which were
    drawn together.

    Args:
        model: See :func:`generate`.
        tokenizer: Likewise.
        prompts: N prompts' token ids, without a start token.
        options: How.
        on_text: See :func:`generate`.
        progress: Told prompts.

    Returns:
        N continuations without prompt and end token; special tokens are written as in the prompt.

    Raises:
        EncoderError: See :func:`generate`.
    """
    if on_text is not None and len(prompts) != 1:
        raise ValueError(f"on_text needs exactly one prompt, got {len(prompts)}")
    start = start_token(tokenizer)
    rows = [[start, *prompt] for prompt in prompts]
    longest: int = model.config.max_position_embeddings
    if rows and max(map(len, rows)) >= longest:
        raise EncoderError(
            f"a prompt must be shorter than the model's {longest} tokens, its start token "
            f"included, got {max(map(len, rows))}: shorten it"
        )
    # Like lengths together: less padding. Ties in the given order.
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    texts = [""] * len(rows)
    progress(0, len(rows))
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(), quiet_transformers():
            torch.manual_seed(options.seed)
            for first in range(0, len(order), options.batch_texts):
                batch = order[first : first + options.batch_texts]
                streamer = None if on_text is None else _WholeCharacters(tokenizer, on_text)
                written = _continue(model, tokenizer, [rows[r] for r in batch], options, streamer)
                for row, tokens in zip(batch, written, strict=True):
                    texts[row] = decode(tokenizer, tokens)
                progress(len(batch), len(rows))
    finally:
        model.train(was_training)
    return texts


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of tokens, special ones included; bytes at the end that are no character are cut."""
    text: str = tokenizer.decode(
        tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def _continue(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    options: GenerationOptions,
    streamer: BaseStreamer | None,
) -> list[list[int]]:
    """The tokens that follow each row, the end token and what comes after it cut off."""
    end = end_token(tokenizer)
    width = max(map(len, rows))
    # Padding on the left, so that all rows go on at the same place; 0 = padding in the mask.
    block = torch.tensor([[end] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    room = int(model.config.max_position_embeddings) - width
    drawn = options.temperature > 0
    config = GenerationConfig(
        max_new_tokens=min(options.max_tokens, room),
        do_sample=drawn,
        # transformers' top-50 by default would silently cut what is drawn from.
        **(
            {"temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
            if drawn
            else {}
        ),
        use_cache=True,
        eos_token_id=end,
        pad_token_id=end,
    )
    written = model.generate(
        input_ids=block.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
        streamer=streamer,
    )[:, width:].tolist()
    return [row[: row.index(end)] if end in row else row for row in written]


class _WholeCharacters(BaseStreamer):  # type: ignore[misc]  # untyped
    """Tells text when its characters are complete: a token may end inside of one."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._end = end_token(tokenizer)
        self._on_text = on_text
        self._stream = DecodeStream(skip_special_tokens=False)
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """Take the prompt first, then token by token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            piece = None if token == self._end else self._stream.step(self._tokenizer, token)
            if piece:
                self._on_text(piece)

    def end(self) -> None:
        """Drop bytes that never became a character."""
