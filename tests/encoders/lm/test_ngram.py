"""The n-gram model gives proper probabilities, those of the equation, and finds structure."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from nltk.lm import KneserNeyInterpolated  # type: ignore[import-untyped]
from nltk.util import everygrams, pad_sequence  # type: ignore[import-untyped]
from numpy.typing import NDArray

from encoders.lm.ngram import NgramModel
from feature_repo.errors import EncoderError

VOCABULARY = 7

Gram = tuple[int, ...]


def corpus(seed: int, num: int = 40) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [
        [*random.zipf(1.6, size=random.integers(1, 12)).clip(1, VOCABULARY - 1).tolist(), 0]
        for _ in range(num)
    ]


def distribution(model: NgramModel, context: Sequence[int]) -> NDArray[np.float64]:
    """Probability of every token after a context, [V]."""
    rows = model.log2_probabilities([[*context, token] for token in range(VOCABULARY)])
    return np.array([2.0 ** row[-1] for row in rows])


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_sum_to_one_in_every_context(order: int) -> None:
    model = NgramModel(corpus(0), VOCABULARY, order=order)
    # Seen, unseen, impossible (after an end), shorter and longer than the model looks.
    for context in ([], [1], [1, 2], [1, 1, 1, 1], [6, 6, 6, 6, 6, 6], [0, 0, 3, 0], [2, 6, 1, 5]):
        chances = distribution(model, context)
        assert (chances > 0).all()
        assert chances.sum() == pytest.approx(1, abs=1e-12)


def discounts(counts: list[int]) -> dict[int, float]:
    """Of n-grams seen once, twice, and more often, as Chen and Goodman estimate them."""
    num = {count: counts.count(count) for count in range(1, 5)}
    fallback = {1: 0.5, 2: 1.0, 3: 1.5}  # KenLM's
    if not (num[1] and num[2] and num[3]):
        return fallback
    share = num[1] / (num[1] + 2 * num[2])
    found = {count: count - (count + 1) * share * num[count + 1] / num[count] for count in fallback}
    return found if all(0 <= found[count] <= count for count in found) else fallback


def by_the_equation(rows: list[list[int]], order: int) -> dict[Gram, float]:
    """p(w | h) of every seen context and every token, recursively from dictionaries of counts."""
    begin = VOCABULARY
    grams: dict[int, Counter[Gram]] = defaultdict(Counter)
    for row in rows:
        padded = (*[begin] * (order - 1), *row)
        for end in range(order - 1, len(padded)):
            for length in range(1, order + 1):
                grams[length][padded[end - length + 1 : end + 1]] += 1
    # Below the highest order, how many distinct tokens come before.
    counts = {n: Counter(longer[1:] for longer in grams[n + 1]) for n in range(1, order)}
    counts[order] = grams[order]
    taken = {length: discounts(list(found.values())) for length, found in counts.items()}

    def chance(word: int, context: Gram) -> float:
        seen = [counts[len(context) + 1][(*context, other)] for other in range(VOCABULARY)]
        below = chance(word, context[1:]) if context else 1 / VOCABULARY
        if not sum(seen):
            return below
        discount = {0: 0.0, **taken[len(context) + 1]}
        kept = seen[word] - discount[min(seen[word], 3)]
        left = sum(discount[min(number, 3)] for number in seen)
        return (kept + left * below) / sum(seen)

    contexts = {gram[:-1] for gram in grams[order]}
    return {(*h, w): chance(w, h) for h in contexts for w in range(VOCABULARY)}


@pytest.mark.parametrize("order", [1, 2, 3])
def test_it_is_the_equation(order: int) -> None:
    rows = corpus(1, num=12)
    model = NgramModel(rows, VOCABULARY, order=order)
    for gram, expected in by_the_equation(rows, order).items():
        *context, word = gram
        # Behind marks: as the first tokens of a document.
        inside = [token for token in context if token != VOCABULARY]
        assert distribution(model, inside)[word] == pytest.approx(expected, rel=1e-12)


def test_a_library_agrees() -> None:
    """Where every pair was seen once: its discount is .5 then, and nltk knows a single one.

    From order 3 on, nltk predicts the marks of a beginning too, so it differs by a little.
    """
    steps = np.array([0, 1, 3, 6, 10, 15])  # their differences are distinct modulo 6
    rows = [[*((first + steps) % 6 + 1).tolist(), 0] for first in range(5)]
    pairs = Counter(pair for row in rows for pair in pairwise([VOCABULARY, *row]))
    before = Counter(second for _, second in pairs)
    assert set(pairs.values()) == {1}
    # Three or more before every token: one discount for all, which cancels.
    assert min(before[token] for token in range(VOCABULARY)) >= 3
    words = [[str(token) for token in row] for row in rows]
    library = KneserNeyInterpolated(2, discount=0.5)
    padded = (pad_sequence(row, 2, pad_left=True, left_pad_symbol="<s>") for row in words)
    library.fit(
        [list(everygrams(list(row), max_len=2)) for row in padded],
        [word for row in words for word in row],
    )
    model = NgramModel(rows, VOCABULARY, order=2)
    for context in range(1, VOCABULARY):
        theirs = [library.score(str(word), [str(context)]) for word in range(VOCABULARY)]
        np.testing.assert_allclose(distribution(model, [context]), theirs, atol=1e-9)
        assert len(set(theirs)) > 1


def test_where_counts_tell_no_discount_it_is_kenlms() -> None:
    rows = [[1] * 3 + [0]] * 1 + corpus(5, num=3000)
    model = NgramModel(rows, VOCABULARY, order=1)
    # A unigram model counts occurrences: no count below 5 here, so KenLM's fallback is taken.
    counts = np.bincount(np.concatenate([np.array(row) for row in rows]), minlength=VOCABULARY)
    expected = (counts - 1.5) / counts.sum() + 1.5 * VOCABULARY / counts.sum() / VOCABULARY
    np.testing.assert_allclose(distribution(model, []), expected)


def test_more_context_and_more_text_help() -> None:
    """A cycle of 6 tokens is certain after one of them, and text of another kind is not."""
    cycle = [[1, 2, 3, 4, 5, 6] * 5 + [0]] * 30
    random = np.random.default_rng(0)
    noise = [random.integers(1, VOCABULARY, size=30).tolist() for _ in range(3)]
    bits = {
        order: -np.concatenate(
            NgramModel(cycle, VOCABULARY, order=order).log2_probabilities(cycle[:1])
        ).mean()
        for order in (1, 2, 5)
    }
    assert bits[5] < bits[2] < 0.5 < bits[1]
    model = NgramModel(cycle, VOCABULARY)
    rows = model.log2_probabilities(noise)
    assert [len(row) for row in rows] == [30, 30, 30]
    assert -np.concatenate(rows).mean() > 3


def test_documents_do_not_see_each_other() -> None:
    rows = corpus(3)
    model = NgramModel(rows, VOCABULARY)
    together = model.log2_probabilities(rows[:5])
    for row, found in zip(rows[:5], together, strict=True):
        np.testing.assert_array_equal(model.log2_probabilities([row])[0], found)


@pytest.mark.parametrize(
    ("documents", "sentence"),
    [
        ([], "needs text to count"),
        ([[1, VOCABULARY]], re.escape(f"token ids must be in [0, {VOCABULARY})")),
        ([[-1]], "do not fit"),
    ],
)
def test_sentences(documents: list[list[int]], sentence: str) -> None:
    with pytest.raises(EncoderError, match=sentence):
        NgramModel(documents, VOCABULARY)
    with pytest.raises(EncoderError, match="at least 1, got 0"):
        NgramModel([[1]], VOCABULARY, order=0)
