"""Which text is left out, and why."""

from typing import Any

import pytest

from encoders.lm.quality import QualityConfig, quality_problem
from feature_repo.errors import DataSetError

GOOD = "Return the sum of all values.\n\nEmpty iterables give the start value, 0 by default."


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, None),
        ("Return the sum.", "too_short"),
        ("+----+----+\n|  a |  b |\n+----+----+", "symbols"),
        ("one line\nanother line\none line\none line\n", "repeated_lines"),
        ("buy now " * 15, "repeated_words"),
        ("buy now " * 5, None),  # too few words to judge
        ("кофемолка ручная, керамические жернова", None),
    ],
)
def test_reasons(text: str, reason: str | None) -> None:
    assert quality_problem(text, QualityConfig()) == reason


def test_thresholds_decide() -> None:
    assert quality_problem(GOOD, QualityConfig(min_characters=len(GOOD))) is None
    assert quality_problem(GOOD, QualityConfig(min_characters=len(GOOD) + 1)) == "too_short"
    symbols = sum(not (c.isalnum() or c.isspace()) for c in GOOD) / len(GOOD)
    assert quality_problem(GOOD, QualityConfig(max_symbol_share=symbols)) is None
    assert quality_problem(GOOD, QualityConfig(max_symbol_share=symbols / 2)) == "symbols"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"max_symbol_share": 1.5}, r"max_symbol_share must be in \[0, 1\], got 1.5"),
        ({"min_characters": 0}, "min_characters must be at least 1, got 0"),
    ],
)
def test_sentences(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataSetError, match=sentence):
        QualityConfig(**change)
