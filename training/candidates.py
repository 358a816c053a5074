"""Candidates as flat rows: one pass of the user side, and no work on padding.

Shapes: B = contexts, C = candidates per context, R = flat rows.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class FlatCandidates:
    """The rows of a [B, C] block on which a head computes.

    Eagerly these are the candidates that are there (key not 0), so padding costs nothing. In an
    exported program they are all B x C, for its shapes must not depend on values. A row's logit
    depends on that row alone, so both give the same.

    Args:
        item_keys: int64 [B, C]; 0 = padding.
    """

    def __init__(self, item_keys: Int[Tensor, "B C"]) -> None:
        self._shape = item_keys.shape
        self._keep: Bool[Tensor, "B C"] | None = None
        if not torch.compiler.is_exporting():
            self._keep = item_keys != 0
            self._owner = self._keep.nonzero()[:, 0]

    @property
    def num_rows(self) -> int:
        """R."""
        return self._shape[0] * self._shape[1] if self._keep is None else len(self._owner)

    def select(self, values: Tensor) -> Tensor:
        """[B, C, ...] -> [R, ...]."""
        return values.flatten(0, 1) if self._keep is None else values[self._keep]

    def spread(self, values: Tensor) -> Tensor:
        """[B, ...] -> [R, ...]: every candidate gets the values of its context."""
        if self._keep is not None:
            return values[self._owner]
        num_candidates = self._shape[1]
        shape = (-1, num_candidates, *([-1] * (values.dim() - 1)))
        return values.unsqueeze(1).expand(shape).flatten(0, 1)

    def restore(self, values: Tensor) -> Tensor:
        """[R, ...] -> [B, C, ...]; padding is 0."""
        if self._keep is None:
            return values.reshape(*self._shape, *values.shape[1:])
        return values.new_zeros((*self._shape, *values.shape[1:])).index_put((self._keep,), values)
