"""The cuts, by example."""

import pytest

from encoders.lm.pretokenizer import phrase_pre_tokenizer, word_pre_tokenizer


def cuts(pre_tokenizer: object, text: str) -> list[str]:
    found = pre_tokenizer.pre_tokenize_str(text)  # type: ignore[attr-defined]
    return [text[start:stop] for _, (start, stop) in found]


@pytest.mark.parametrize(
    ("text", "phrases", "words"),
    [
        ("set of 3 bags", ["set of 3 bags"], ["set", " of", " 3", " bags"]),
        ("t-light 12345678cm", ["t-light 123", "456", "78cm"], None),
        ("a\n\n  b", ["a", "\n\n", "  b"], ["a", "\n\n", " ", " b"]),
        ("2.55", ["2.55"], ["2", ".", "55"]),
        ("don't!?", ["don't!?"], ["don", "'", "t", "!?"]),
        ("चाय 茶 ١٢٣٤", ["चाय 茶 ١٢٣", "٤"], ["चाय", " 茶", " ١٢٣", "٤"]),
        ("", [], []),
    ],
)
def test_cuts(text: str, phrases: list[str], words: list[str] | None) -> None:
    assert cuts(phrase_pre_tokenizer(), text) == phrases
    if words is not None:
        assert cuts(word_pre_tokenizer(), text) == words
