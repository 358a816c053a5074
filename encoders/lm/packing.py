"""Rows of equal length, filled with documents: the batch of step s is a function of s.

The sources' documents stand in a row without end, in another order in every epoch, and each step
takes from every source its share of tokens, from where the step before ended. So the number of
steps done is all that a killed run must know to go on, and every batch has the mixture's shares.

Shapes: B = rows of a batch, T = tokens of a row.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol
from zlib import crc32

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from encoders.lm.loss import IGNORED
from encoders.lm.shards import TokenShard
from feature_repo.errors import EncoderError

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class PackedRows:
    """What a model is given and what it should tell.

    Args:
        inputs: The token before each target; a document's first target has the start token.
        targets: :data:`encoders.lm.loss.IGNORED` where nothing is learned.
        positions: Place in the document, from 0; a part of a cut document begins from 0 again.
    """

    inputs: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]

    def rows(self, first: int, stop: int) -> "PackedRows":
        """Some of the rows."""
        part = slice(first, stop)
        return PackedRows(self.inputs[part], self.targets[part], self.positions[part])

    def to(self, device: torch.device) -> "PackedRows":
        """The same on a device."""
        return PackedRows(
            self.inputs.to(device), self.targets.to(device), self.positions.to(device)
        )

    @property
    def num_targets(self) -> int:
        """Tokens that are learned from."""
        return int((self.targets != IGNORED).sum())


class BatchStream(Protocol):
    """Where a training takes its batches from."""

    def batch(self, step: int) -> PackedRows:
        """The rows of a step, a function of the step (from 0) alone; always the same shape."""


def pack(
    inputs: Tokens, targets: Tokens, begins: NDArray[np.bool_], *, rows: int, length: int
) -> PackedRows:
    """Cut documents that stand one behind the other into rows, and fill up the last ones.

    Args:
        inputs: Of all documents, int64 [at most rows x length].
        targets: Likewise.
        begins: True where a document begins.
        rows: B.
        length: T.
    """
    size = rows * length
    fill = size - len(inputs)
    assert fill >= 0, "more tokens than the rows hold"
    inputs = np.pad(inputs, (0, fill))
    targets = np.pad(targets, (0, fill), constant_values=IGNORED)
    begins = np.pad(begins, (0, fill))
    begins[size - fill : size - fill + 1] = True  # what fills up is a document of its own
    begins[::length] = True
    place = np.arange(size, dtype=np.int64)
    positions = place - np.maximum.accumulate(np.where(begins, place, 0))
    blocks = (torch.from_numpy(block).view(rows, length) for block in (inputs, targets, positions))
    return PackedRows(*blocks)


class TokenStream:
    """Batches from shards, mixed by source.

    A document that a row or a step cuts goes on in the next one, told from the token before the cut
    alone. Reading costs 16 bytes of memory per document of the sources: an epoch's order.

    Args:
        shards: Source -> its tokenised documents.
        weights: Source -> share of the tokens, of any sum; sources without a weight are left out.
        start: Token that the first token of a document is told from.
        sequence_length: T.
        batch_rows: B.
        seed: Of the documents' order.

    Raises:
        EncoderError: If no source with a weight has a document, or a batch is too small to hold a
            token of each source.
    """

    def __init__(
        self,
        shards: Mapping[str, TokenShard],
        weights: Mapping[str, float],
        *,
        start: int,
        sequence_length: int,
        batch_rows: int,
        seed: int,
    ) -> None:
        kept = {s: w for s, w in weights.items() if w > 0 and s in shards and shards[s].num_tokens}
        if not kept:
            raise EncoderError(
                "the corpus has no documents to learn from: its train split is empty in every "
                f"source of the mixture ({', '.join(sorted(weights)) or 'none'}); ingest more, or "
                "add texts with `longtrail lm corpus --source`"
            )
        # Each source may give one token more than its share: room for it in every batch.
        self._budget = batch_rows * sequence_length - len(kept)
        if self._budget < len(kept):
            raise EncoderError(
                f"a batch of {batch_rows} rows of {sequence_length} tokens is too small for "
                f"{len(kept)} sources: raise --batch-rows"
            )
        total = math.fsum(kept.values())
        self.shares = {source: weight / total for source, weight in sorted(kept.items())}
        """Source -> its share of every batch; their sum is 1."""
        self._readers = {s: _Reader(shards[s], start, [seed, crc32(s.encode())]) for s in kept}
        self.batch_rows, self.sequence_length = batch_rows, sequence_length

    def batch(self, step: int) -> PackedRows:
        """The rows of a step, from 0."""
        parts = [
            self._readers[source].read(
                int(step * self._budget * share), int((step + 1) * self._budget * share)
            )
            for source, share in self.shares.items()
        ]
        inputs, targets, begins = (np.concatenate(column) for column in zip(*parts, strict=True))
        return pack(inputs, targets, begins, rows=self.batch_rows, length=self.sequence_length)


class _Reader:
    """One source's documents as a row of tokens without end."""

    def __init__(self, shard: TokenShard, start: int, seed: list[int]) -> None:
        self._shard = shard
        self._start = start
        self._seed = seed
        self._epoch = -1
        self._order: Tokens = np.empty(0, dtype=np.int64)
        self._stops: Tokens = np.empty(0, dtype=np.int64)

    def read(self, first: int, stop: int) -> tuple[Tokens, Tokens, NDArray[np.bool_]]:
        """Inputs, targets and beginnings of the tokens ``first <= place < stop``."""
        targets = np.empty(stop - first, dtype=np.int64)
        inputs = np.empty_like(targets)
        begins = np.zeros(len(targets), dtype=bool)
        done = 0
        while done < len(targets):
            document, at = self._find(first + done)
            take = min(len(document) - at, len(targets) - done)
            part = slice(done, done + take)
            targets[part] = document[at : at + take]
            inputs[done] = document[at - 1] if at else self._start
            inputs[done + 1 : part.stop] = document[at : at + take - 1]
            begins[done] = True
            done += take
        return inputs, targets, begins

    def _find(self, place: int) -> tuple[Tokens, int]:
        """The document at a place, and how many of its tokens come before the place."""
        epoch, place = divmod(place, self._shard.num_tokens)
        if epoch != self._epoch:
            random = np.random.default_rng([*self._seed, epoch])
            self._order = random.permutation(len(self._shard.stops))
            self._stops = np.cumsum(self._shard.lengths[self._order])
            self._epoch = epoch
        index = int(np.searchsorted(self._stops, place, side="right"))
        document = self._shard.document(int(self._order[index]))
        return document, place - int(self._stops[index]) + len(document)
