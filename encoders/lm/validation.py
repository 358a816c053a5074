"""Bits per byte on the valid split, by which weights are compared while a model is made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from encoders.config import Precision
from encoders.devices import products_in
from encoders.lm.likelihood import document_bits
from encoders.lm.loss import LanguageModelLoss
from encoders.lm.shards import TokenShard
from feature_repo.progress import Progress, silent

ALL = "all"
"""Name of the figure of all sources together."""
_SEED = 0


@dataclass(frozen=True)
class ValidationTexts:
    """Documents of each source, always the same ones.

    Args:
        documents: Source -> token ids of each document.
        num_bytes: Source -> UTF-8 bytes of their texts, above 0.
    """

    documents: Mapping[str, Sequence[NDArray[np.int64]]]
    num_bytes: Mapping[str, int]

    @classmethod
    def choose(cls, shards: Mapping[str, TokenShard], num_bytes: int) -> "ValidationTexts":
        """Whole documents of about ``num_bytes`` of text of each source, at random.

        Args:
            shards: Source -> its documents; sources without text are left out.
            num_bytes: The last document may go beyond.
        """
        documents, sizes = {}, {}
        for source, shard in shards.items():
            order = np.random.default_rng(_SEED).permutation(len(shard.stops))
            before = np.cumsum(shard.num_bytes[order]) - shard.num_bytes[order]
            chosen = np.sort(order[before < num_bytes])
            sizes[source] = int(shard.num_bytes[chosen].sum())
            documents[source] = [shard.document(int(index)) for index in chosen]
        kept = [source for source, size in sizes.items() if size]
        return cls({s: documents[s] for s in kept}, {s: sizes[s] for s in kept})

    def bits_per_byte(
        self,
        loss: LanguageModelLoss,
        *,
        start: int,
        device: torch.device,
        precision: Precision,
        progress: Progress = silent,
    ) -> dict[str, float]:
        """Bits per byte of each source, and of all together under :data:`ALL`.

        Args:
            loss: The model, in evaluation mode.
            start: Token that documents are told from.
            device: Where the model lies.
            precision: Of the matrix products.
            progress: Told documents.
        """
        tell = _teller(loss, device, precision)
        context: int = loss.model.config.max_position_embeddings
        total = sum(len(documents) for documents in self.documents.values())
        bits: dict[str, float] = {}
        for source, documents in self.documents.items():
            found = document_bits(tell, documents, start=start, context=context, device=device)
            bits[source] = float(found.sum())
            progress(len(documents), total)
        figures = {source: bits[source] / self.num_bytes[source] for source in bits}
        if bits:
            figures[ALL] = sum(bits.values()) / sum(self.num_bytes.values())
        return figures


def _teller(
    loss: LanguageModelLoss, device: torch.device, precision: Precision
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def tell(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with products_in(precision, device):
            nats: torch.Tensor = loss(inputs, targets, by_token=True)
        return nats

    return tell
