"""Trees as tensors: many rows walk down many trees at once.

Shapes: R = rows, F = features, T = trees, K = nodes of all trees, end to end.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

ROWS_AT_ONCE = 512
TREES_AT_ONCE = 64
"""Of one walk: its places, 8 bytes per row and tree, stay in a core's cache."""


@dataclass(frozen=True)
class GrownTrees:
    """Trees as arrays; ``x <= threshold`` goes left.

    Args:
        feature: int [K]; 0 in leaves.
        threshold: float64 [K].
        missing_left: bool [K]; where NaN goes.
        left: int [K]; place of the left child, in leaves the leaf itself.
        right: int [K]; likewise.
        value: float64 [K]; logit that a leaf adds.
        roots: int [T].
        depth: Steps from a root to its deepest leaf, of all trees.
        base: Logit before any tree.
    """

    feature: NDArray[np.int64]
    threshold: NDArray[np.float64]
    missing_left: NDArray[np.bool_]
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    value: NDArray[np.float64]
    roots: NDArray[np.int64]
    depth: int
    base: float


class TreeEnsemble(nn.Module):
    """The sum of the leaves that a row falls into.

    Roots come first and siblings lie side by side, so that one number names both children; a leaf
    is the left child of itself, of a threshold that nothing exceeds. Each feature is there twice,
    missing as -inf and as NaN, so that a node sends missing values where it wants by the column
    that it reads.

    Cost: R x T x depth steps, each four gathers.
    """

    column: Tensor
    """int64 [K], of 2 F: those where missing goes left first."""
    threshold: Tensor
    """float32 [K]."""
    right: Tensor
    """int64 [K]: the left child is the one before."""
    value: Tensor
    """float32 [K]."""
    num_trees: Tensor
    depth: Tensor
    base: Tensor

    def __init__(self) -> None:
        super().__init__()
        nothing = np.zeros(1, dtype=np.int64)
        self.set_trees(
            GrownTrees(
                feature=nothing,
                threshold=np.zeros(1),
                missing_left=np.zeros(1, dtype=bool),
                left=nothing,
                right=nothing,
                value=np.zeros(1),
                roots=nothing,
                depth=0,
                base=0.0,
            ),
            num_features=1,
        )

    def set_trees(self, trees: GrownTrees, *, num_features: int) -> None:
        """Take the place of the trees that are there."""
        order, place = _siblings_side_by_side(trees)
        is_leaf = trees.left == np.arange(len(trees.left))
        column = trees.feature + np.where(trees.missing_left | is_leaf, 0, num_features)
        threshold = np.where(is_leaf, np.float32(np.inf), _float32_at_most(trees.threshold))
        buffers = {
            "column": torch.from_numpy(column[order].astype(np.int64)),
            "threshold": torch.from_numpy(threshold[order]),
            "right": torch.from_numpy(np.where(is_leaf, place + 1, place[trees.right])[order]),
            "value": torch.from_numpy(trees.value[order].astype(np.float32)),
            "num_trees": torch.tensor(len(trees.roots)),
            "depth": torch.tensor(trees.depth),
            "base": torch.tensor(trees.base, dtype=torch.float32),
        }
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        self._set_sizes()

    def _set_sizes(self) -> None:
        self._num_trees, self._steps = int(self.num_trees), int(self.depth)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: object
    ) -> None:
        """Take the sizes of the trees that are loaded."""
        for name in dict(self.named_buffers(recurse=False)):
            if prefix + name in state_dict:
                self.register_buffer(name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._set_sizes()

    def forward(self, x: Float[Tensor, "R F"]) -> Float[Tensor, " R"]:
        """The logits."""
        if torch.compiler.is_exporting():
            return self._logits(x)
        return torch.cat([self._logits(part) for part in torch.split(x, ROWS_AT_ONCE)])

    def _logits(self, x: Float[Tensor, "R F"]) -> Float[Tensor, " R"]:
        missing_low = torch.where(x.isnan(), -torch.inf, x)
        values = torch.cat([missing_low, x], dim=1).t().reshape(-1)  # [2 F R], a column's together
        logits = self.base.expand(x.shape[0])
        for first in range(0, self._num_trees, TREES_AT_ONCE):
            last = min(first + TREES_AT_ONCE, self._num_trees)
            logits = logits + self._walk(values, x.shape[0], first, last)
        return logits

    def _walk(
        self, values: Float[Tensor, " 2FR"], num_rows: int, first: int, last: int
    ) -> Float[Tensor, " R"]:
        """What trees ``first`` to ``last`` add."""
        shape = (last - first, num_rows)
        device = values.device
        row = torch.arange(num_rows, device=device).expand(shape).reshape(-1)
        place = torch.arange(first, last, device=device)[:, None].expand(shape).reshape(-1)
        for _ in range(self._steps):
            value = values.index_select(0, self.column.index_select(0, place) * num_rows + row)
            goes_left = value <= self.threshold.index_select(0, place)
            place = self.right.index_select(0, place) - goes_left.long()
        return self.value.index_select(0, place).view(shape).sum(0)


def _siblings_side_by_side(trees: GrownTrees) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Nodes in a new order, level by level, and the new place of each, [K] both."""
    levels = [trees.roots]
    while True:
        last = levels[-1]
        inner = last[trees.left[last] != last]
        if not len(inner):
            break
        levels.append(np.stack([trees.left[inner], trees.right[inner]], axis=1).reshape(-1))
    order = np.concatenate(levels).astype(np.int64)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return order, place


def _float32_at_most(threshold: NDArray[np.float64]) -> NDArray[np.float32]:
    """Rounded down, which splits inputs, as they are float32, alike."""
    with np.errstate(over="ignore"):  # beyond float32: infinity, and the next lines mend it
        rounded = threshold.astype(np.float32)
    above = rounded.astype(np.float64) > threshold
    rounded[above] = np.nextafter(rounded[above], np.float32(-np.inf))
    return rounded
