"""Which free text is worth learning from: length, share of symbols, repetition.

Records made by templates are not filtered: they are what the data set says.
"""

import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from feature_repo.errors import DataSetError

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class QualityConfig:
    """Thresholds of :func:`quality_problem`.

    Raises:
        DataSetError: If a value is outside its range.

    Source:
        Rae et al., "Scaling Language Models" (Gopher), 2021, arXiv:2112.11446, table A1. Its limits
        on whole web pages (50 words, stop words) are left out: product texts are short.
    """

    min_characters: int = 20
    """Shorter texts are fragments."""
    max_symbol_share: float = 0.3
    """Of characters that are neither letters, digits nor white space; drawings and dumps have
    more. Documentation with code in it has .1 to .2."""
    max_repeated_lines: float = 0.3
    """Share of lines that are copies of an earlier one."""
    max_pair_share: float = 0.2
    """Share of the words' characters that the most frequent pair of words may take, in texts of at
    least ``min_repetition_words``."""
    min_repetition_words: int = 20
    """In shorter texts any pair takes a large share."""

    def __post_init__(self) -> None:
        for name in ("max_symbol_share", "max_repeated_lines", "max_pair_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataSetError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("min_characters", "min_repetition_words"):
            if getattr(self, name) < 1:
                raise DataSetError(f"{name} must be at least 1, got {getattr(self, name)}")


def quality_problem(text: str, config: QualityConfig) -> str | None:
    """Why a text is left out, or None where it is good enough.

    Returns:
        ``too_short``, ``symbols``, ``repeated_lines`` or ``repeated_words``.
    """
    if len(text) < config.min_characters:
        return "too_short"
    symbols = sum(not (character.isalnum() or character.isspace()) for character in text)
    if symbols > config.max_symbol_share * len(text):
        return "symbols"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) - len(set(lines)) > config.max_repeated_lines * len(lines):
        return "repeated_lines"
    words = _WORD.findall(text.lower())
    if len(words) >= config.min_repetition_words:
        pairs = Counter(pairwise(words))
        (first, second), count = pairs.most_common(1)[0]
        characters = sum(map(len, words))
        if count > 1 and count * (len(first) + len(second)) > config.max_pair_share * characters:
            return "repeated_words"
    return None
