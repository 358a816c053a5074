"""Duplicates, beside the exact likeness of all pairs."""

from itertools import combinations

from encoders.lm.duplicates import DuplicateFilter, shingles

TEXTS = [
    "turquoise lampshade of woven bamboo, made by hand in Kerala, with a cord of two metres",
    "cake stand with three tiers of painted tin, the largest plate measures thirty centimetres",
    "hanging heart of white wicker for the window, sold in boxes of six and in boxes of twelve",
    "lunch bag with polka dots, lined with foil so that it keeps warm what is warm for hours",
]


def likeness(one: str, other: str) -> float:
    first, second = set(shingles(one)), set(shingles(other))
    return len(first & second) / len(first | second)


def test_exact_copies_are_found_and_the_first_is_kept() -> None:
    problem = DuplicateFilter(None).problem
    assert [problem(text) for text in ("a", "b", "a")] == [None, None, "exact_duplicate"]


def test_very_alike_texts_are_found_and_unlike_ones_are_not() -> None:
    assert all(likeness(one, other) < 0.1 for one, other in combinations(TEXTS, 2))
    problem = DuplicateFilter(0.8).problem
    assert [problem(text) for text in TEXTS] == [None] * len(TEXTS)
    alike = [change for text in TEXTS for change in (text + ".", text.upper(), text[2:])]
    assert all(max(likeness(text, change) for text in TEXTS) > 0.95 for change in alike)
    assert [problem(change) for change in alike] == ["near_duplicate"] * len(alike)
    halves = [text[:30] + " " + text[::-1] for text in TEXTS]
    assert all(max(likeness(text, half) for text in TEXTS) < 0.4 for half in halves)
    assert [problem(half) for half in halves] == [None] * len(halves)


def test_short_texts_are_their_own_pieces() -> None:
    assert list(shingles("ab")) == [b"ab"]
    assert list(shingles("ABCDEF")) == [b"abcde", b"bcdef"]
    problem = DuplicateFilter(0.8).problem
    assert [problem(text) for text in ("mug", "jug", "MUG")] == [None, None, "near_duplicate"]
