"""What a language model has to beat: an n-gram model with modified Kneser-Ney smoothing.

KenLM's estimate, over token ids and in numpy, so that a million tokens take seconds and nothing has
to be compiled. It reads the same tokens as a language model, so its bits per byte compare.

Shapes: T = tokens of a stream, K = distinct n-grams of one order, V = tokens of the vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feature_repo.errors import EncoderError

DEFAULT_ORDER = 5
_NUM_DISCOUNTS = 3
"""For n-grams that were seen once, twice, and more often."""

Ids = NDArray[np.int64]
Document = Sequence[int] | NDArray[np.integer[Any]]


@dataclass(frozen=True)
class _Order:
    """The n-grams of one length n, each a number: its place in ``keys``."""

    keys: Ids
    """[K], sorted: number of the first n - 1 tokens * symbols + last token."""
    discounted: NDArray[np.float64]
    """[K], share of its context's count after the discount; a context = its first n - 1 tokens."""
    left_over: NDArray[np.float64]
    """[contexts], what the discounts leave of each context for the next shorter one; 1 = unseen."""


class NgramModel:
    """Interpolated modified Kneser-Ney: proper probabilities of every token in every context.

    With c the count of an n-gram at the highest order, and the number of distinct tokens before it
    at the lower ones, and h' the context h without its oldest token::

        p(w | h) = (c(h w) - D(c(h w))) / sum_v c(h v) + left_over(h) * p(w | h')
        left_over(h) = sum_v D(c(h v)) / sum_v c(h v)

    and ``1 / V`` below the unigrams. The discounts D of counts 1, 2 and 3 or more are estimated for
    each order. A document is read after n - 1 marks of its beginning, which are never predicted.

    Args:
        documents: Token ids of each, its end token included; at least one token in all.
        num_tokens: V; every id is below it.
        order: n, at least 1.

    Raises:
        EncoderError: If there is no token, or an id is outside ``[0, num_tokens)``.

    Source:
        Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling", 1998,
        section 3; the interpolated form with 1 / V of Heafield et al., "Scalable Modified
        Kneser-Ney Language Model Estimation", ACL 2013.
    """

    def __init__(
        self,
        documents: Iterable[Document],
        num_tokens: int,
        *,
        order: int = DEFAULT_ORDER,
    ) -> None:
        if order < 1:
            raise EncoderError(f"the order of an n-gram model must be at least 1, got {order}")
        self.order = order
        self.num_tokens = num_tokens
        self._begin = num_tokens  # the mark of a beginning
        self._symbols = num_tokens + 1
        stream, predicted = self._stream(documents)
        if not predicted.any():
            raise EncoderError("an n-gram model needs text to count, but no document has a token")
        self._orders = self._count(stream, predicted)

    def log2_probabilities(self, documents: Iterable[Document]) -> list[NDArray[np.float64]]:
        """Log2 probability of every token of each document in its context; O(T n log K).

        Raises:
            EncoderError: If an id is outside the vocabulary.
        """
        rows = [np.asarray(row, dtype=np.int64) for row in documents]
        stream, predicted = self._stream(rows)
        chances = np.log2(self._probabilities(stream)[predicted])
        return np.split(chances, np.cumsum([len(row) for row in rows])[:-1]) if rows else []

    def _stream(self, documents: Iterable[Document]) -> tuple[Ids, NDArray[np.bool_]]:
        """All documents after their marks, [T], and which of it is to be predicted, [T]."""
        marks = np.full(self.order - 1, self._begin, dtype=np.int64)
        parts = [np.empty(0, dtype=np.int64)]
        for row in documents:
            parts += [marks, np.asarray(row, dtype=np.int64)]
        stream = np.concatenate(parts)
        predicted = np.concatenate(
            [np.full(len(part), number % 2 == 0) for number, part in enumerate(parts)]
        )
        ids = stream[predicted]
        if len(ids) and not (ids.min() >= 0 and ids.max() < self.num_tokens):
            raise EncoderError(
                f"token ids must be in [0, {self.num_tokens}) (the vocabulary), got "
                f"{ids.min()} to {ids.max()}: the tokenizer and the n-gram model do not fit"
            )
        return stream, predicted

    def _count(self, stream: Ids, predicted: NDArray[np.bool_]) -> list[_Order]:
        """Every order's n-grams and what they leave, shortest first."""
        # Whether all n tokens that end here belong to one document: n - 1 marks stand before each,
        # so an n-gram that ends in a predicted token never reaches into the document before.
        ends = np.flatnonzero(predicted)
        keys: list[Ids] = []
        counts: list[Ids] = []
        numbers = np.zeros(len(stream), dtype=np.int64)  # of the n-gram that ends at each place
        for length in range(1, self.order + 1):
            # All places, also those of marks: they begin longer n-grams.
            shorter, places = numbers, np.arange(length - 1, len(stream))
            before = shorter[places - 1] if length > 1 else np.zeros(len(places), dtype=np.int64)
            every = before * self._symbols + stream[places]
            found, inverse = np.unique(every, return_inverse=True)
            numbers = np.full(len(stream), -1, dtype=np.int64)
            numbers[places] = inverse
            keys.append(found)
            counts.append(np.bincount(numbers[ends], minlength=len(found)))
            if length > 1:
                # Distinct tokens before each shorter n-gram: once per distinct longer one.
                longer = np.full(len(found), -1, dtype=np.int64)
                longer[numbers[ends]] = shorter[ends]
                seen = longer[longer >= 0]
                counts[length - 2] = np.bincount(seen, minlength=len(keys[length - 2]))
        num_contexts = [1, *(len(found) for found in keys)]
        return [
            self._smooth(found, count, size)
            for found, count, size in zip(keys, counts, num_contexts, strict=False)
        ]

    def _smooth(self, keys: Ids, counts: Ids, num_contexts: int) -> _Order:
        """Take the discounts from the counts of one order."""
        discounts = np.concatenate([[0.0], _estimate_discounts(counts)])
        taken = discounts[np.minimum(counts, _NUM_DISCOUNTS)]
        contexts = keys // self._symbols
        total = np.bincount(contexts, weights=counts, minlength=num_contexts)
        given = np.bincount(contexts, weights=taken, minlength=num_contexts)
        seen = total > 0
        left_over = np.where(seen, given / np.where(seen, total, 1), 1.0)
        share = (counts - taken) / np.where(seen, total, 1)[contexts]
        return _Order(keys, share, left_over)

    def _probabilities(self, stream: Ids) -> NDArray[np.float64]:
        """Probability of every symbol of a stream given those before it, [T]; marks mean nothing.

        All places at once, order by order. An n-gram's number is found from that of its first
        n - 1 tokens, which ended one place earlier.
        """
        chances = np.full(len(stream), 1 / self.num_tokens)
        numbers = np.zeros(len(stream), dtype=np.int64)  # of the context that ends at each place
        for length, order in enumerate(self._orders, start=1):
            contexts = np.zeros(len(stream), dtype=np.int64)
            if length > 1:
                contexts[0], contexts[1:] = -1, numbers[:-1]
            known = contexts >= 0
            wanted = np.where(known, contexts, 0) * self._symbols + stream
            places = np.minimum(np.searchsorted(order.keys, wanted), len(order.keys) - 1)
            found = known & (order.keys[places] == wanted)
            weights = np.where(known, order.left_over[np.where(known, contexts, 0)], 1.0)
            chances = weights * chances + np.where(found, order.discounted[places], 0.0)
            numbers = np.where(found, places, -1)
        return chances


def _estimate_discounts(counts: Ids) -> NDArray[np.float64]:
    """D of counts 1, 2 and 3 or more, from how many n-grams have counts 1 to 4.

    Where text is too little for the estimate (no n-gram of one of these counts, or a discount
    outside ``[0, count]``), KenLM's fallback of .5, 1 and 1.5.
    """
    once, twice, thrice, four = (int((counts == number).sum()) for number in range(1, 5))
    fallback = np.array([0.5, 1.0, 1.5])
    if not (once and twice and thrice):
        return fallback
    ratio = once / (once + 2 * twice)
    found = np.array(
        [
            1 - 2 * ratio * twice / once,
            2 - 3 * ratio * thrice / twice,
            3 - 4 * ratio * four / thrice,
        ]
    )
    valid = (found >= 0).all() and (found <= np.arange(1, _NUM_DISCOUNTS + 1)).all()
    return found if valid else fallback
