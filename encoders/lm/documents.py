"""A document as tokens: what a language model learns from and is measured on.

A document's tokens end with the end token. What it begins with is no token of its own: the model
is given the start token (``bos`` where the tokenizer has one, else the end token, as if another
document had just ended) and tells the first token from it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feature_repo.errors import EncoderError


def end_token(tokenizer: Any) -> int:
    """The id that ends every document.

    Raises:
        EncoderError: If the tokenizer has no end token.
    """
    token: int | None = tokenizer.eos_token_id
    if token is None:
        raise EncoderError(
            f"the tokenizer in {tokenizer.name_or_path!r} has no end token, which language models "
            "need after every document: set eos_token in its tokenizer_config.json"
        )
    return token


def start_token(tokenizer: Any) -> int:
    """The id from which a model tells the first token of a document.

    Raises:
        EncoderError: If the tokenizer has neither a start nor an end token.
    """
    token: int | None = tokenizer.bos_token_id
    return end_token(tokenizer) if token is None else token


def tokenize_documents(tokenizer: Any, texts: Sequence[str]) -> list[NDArray[np.int64]]:
    """Token ids of every text, int64 [at least 1] each, the end token last.

    Raises:
        EncoderError: If the tokenizer has no end token.
    """
    end = end_token(tokenizer)
    if not texts:
        return []
    # verbose: no warning that a text is longer than the model, for long ones are split later.
    rows = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    return [np.array([*row, end], dtype=np.int64) for row in rows]


def text_bytes(texts: Sequence[str]) -> NDArray[np.int64]:
    """Length of every text in UTF-8 bytes, int64 [N]."""
    return np.array([len(text.encode()) for text in texts], dtype=np.int64)
