"""How many tokens a tokenizer makes of text."""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from encoders.lm.records import field_texts
from feature_repo.manifest import Document

_BATCH_TEXTS = 1000


class Fertility(Document):
    """Text measured with one tokenizer; end tokens are not counted."""

    documents: int
    bytes: int
    """UTF-8, special tokens included."""
    words: int
    """Between white space and special tokens, which are no words."""
    tokens: int

    @property
    def tokens_per_word(self) -> float:
        """NaN without words."""
        return self.tokens / self.words if self.words else float("nan")

    @property
    def tokens_per_byte(self) -> float:
        """NaN without text."""
        return self.tokens / self.bytes if self.bytes else float("nan")


def measure(tokenizer: Any, texts: Iterable[str]) -> Fertility:
    """Tokenise texts and count.

    Args:
        tokenizer: Of transformers. What it adds at the ends of a text is left out.
        texts: Documents, as the corpus has them.
    """
    documents = num_bytes = words = tokens = 0
    stream = iter(texts)
    while batch := list(islice(stream, _BATCH_TEXTS)):
        documents += len(batch)
        num_bytes += sum(len(text.encode()) for text in batch)
        words += sum(len(field.split()) for text in batch for field in field_texts(text))
        tokens += sum(map(len, token_ids(tokenizer, batch)))
    return Fertility(documents=documents, bytes=num_bytes, words=words, tokens=tokens)


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of every text, without what the tokenizer adds at its ends."""
    if not texts:
        return []
    # verbose: no warning that a text is longer than a model takes.
    ids: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    return ids


def tokens_saved(fewer: Fertility, more: Fertility) -> float:
    """Share of the tokens of ``more`` that ``fewer`` needs less of, for the same text."""
    return 1 - fewer.tokens / more.tokens
