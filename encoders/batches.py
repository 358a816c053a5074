"""Texts as token ids, and how they are put together so that hardly any padding is computed.

Shapes: n = texts, B = texts of a batch, T = tokens of its longest text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

_FULL_ENOUGH = 4
"""A batch with a quarter of its token budget is not filled up with longer texts: at that size a
batch costs what its tokens cost, so padding would only add to it."""
_NEARLY_EQUAL = 8
"""Texts up to an eighth longer than the shortest may join a smaller batch."""


@dataclass(frozen=True)
class TokenizedTexts:
    """Token ids of many texts, one after the other.

    Args:
        ids: int64 [sum of lengths].
        lengths: int64 [n]; tokens of each text, at least 1.
    """

    ids: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Place of each text's first token in ``ids``, int64 [n]."""
        return np.cumsum(self.lengths) - self.lengths

    def block(
        self, rows: NDArray[np.int64], *, padding_id: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """Lay texts out as a batch, padded on the right.

        Args:
            rows: int64 [B]; which texts.
            padding_id: Token that fills up shorter texts.

        Returns:
            Token ids int64 [B, T], and the mask int64 [B, T] with 1 = keep, or None where the
            texts are equally long, so that nothing is padding.
        """
        lengths = self.lengths[rows]
        columns = np.arange(lengths.max())
        places = self.starts[rows][:, None] + columns
        keep = columns < lengths[:, None]
        if keep.all():
            return self.ids[places], None
        block = np.full(keep.shape, padding_id, dtype=np.int64)
        block[keep] = self.ids[places[keep]]
        return block, keep.astype(np.int64)


def plan_batches(lengths: NDArray[np.int64], token_budget: int) -> Iterator[slice]:
    """Cut texts sorted by length into batches.

    A batch holds texts of one length, up to the budget; only a small one is filled up with texts
    that are nearly as short. Sorted texts of the same lengths give the same batches.

    Args:
        lengths: int64 [n], ascending.
        token_budget: Most tokens of a batch, padding included; a longer text is a batch alone.

    Yields:
        Consecutive slices that cover all texts.
    """
    start = 0
    while start < len(lengths):
        shortest = int(lengths[start])
        room = start + max(1, token_budget // shortest)
        stop = min(room, int(np.searchsorted(lengths, shortest, side="right")))
        longest_allowed = shortest + shortest // _NEARLY_EQUAL
        if (stop - start) * shortest * _FULL_ENOUGH < token_budget:
            while (
                stop < len(lengths)
                and lengths[stop] <= longest_allowed
                and (stop + 1 - start) * lengths[stop] <= token_budget
            ):
                stop += 1
        yield slice(start, stop)
        start = stop
