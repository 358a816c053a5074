"""Learned vectors of item ids, by the 63-bit keys that sequences and candidates hold."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn


class ItemEmbedding(nn.Module):
    """A vector for every item of the training period; every other item, and none, has zeros.

    The vocabulary is a sorted buffer of keys, so an id is found in O(log I) inside the exported
    program, too. Its size is taken from the training rows (:meth:`set_vocabulary`) or from the
    weights that are loaded.

    Args:
        width: W, of a vector.
    """

    keys: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(1, dtype=torch.int64))
        self.table = nn.Embedding(1, width, padding_idx=0)
        self.register_load_state_dict_pre_hook(_take_size)  # type: ignore[no-untyped-call]

    def set_vocabulary(self, keys: Sequence[NDArray[np.int64]]) -> None:
        """Take the items from training rows, with fresh vectors.

        Args:
            keys: Arrays int64 of any shape; 0 = no item.
        """
        distinct = np.unique(np.concatenate([np.zeros(1, np.int64), *map(np.unique, keys)]))
        self._resize(len(distinct))
        self.keys.copy_(torch.from_numpy(distinct))

    def _resize(self, num_keys: int) -> None:
        """Room for ``num_keys`` items, the first of them "no item", with fresh vectors."""
        device = self.keys.device
        self.keys = torch.zeros(num_keys, dtype=torch.int64, device=device)
        self.table = nn.Embedding(num_keys, self.table.embedding_dim, padding_idx=0, device=device)
        with torch.no_grad():
            nn.init.normal_(self.table.weight[1:], std=0.1)

    def indices(self, keys: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
        """Row of each key, 0 where it is not in the vocabulary."""
        places = torch.searchsorted(self.keys, keys.contiguous())
        places = places.clamp(max=len(self.keys) - 1)
        return torch.where(self.keys[places] == keys, places, 0)

    def forward(self, keys: Int[Tensor, "*N"]) -> Float[Tensor, "*N W"]:
        """The vectors of keys."""
        vectors: Tensor = self.table(self.indices(keys))
        return vectors


def _take_size(
    module: nn.Module, state: dict[str, Any], prefix: str, *_: Any
) -> None:  # the hook's other arguments are of no use here
    """Before weights are loaded: make room for the vocabulary that they are of."""
    assert isinstance(module, ItemEmbedding)
    keys = state.get(f"{prefix}keys")
    if keys is not None and len(keys) != len(module.keys):
        module._resize(len(keys))
