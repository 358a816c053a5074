"""Batches of contexts with their candidates, padded as little as possible.

Shapes: B = contexts of a batch, C = most candidates of one of them, M = behaviours per scene.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.dataset import ClickData

POOL_BATCHES = 16
"""Batches whose contexts are sorted by length together: less padding, and still well mixed."""


@dataclass(frozen=True)
class Batch:
    """Contexts with their candidates.

    Args:
        inputs: The program's inputs after the table, in the order of
            :data:`feature_repo.artifact.PROGRAM_INPUTS`.
        labels: float32 [B, C].
        mask: bool [B, C]; True = keep: a candidate is there.
        rows: int64 [kept]; the data's row of each kept candidate, in row-major order.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor
    mask: Tensor
    rows: NDArray[np.int64]

    def to(self, device: torch.device) -> "Batch":
        """The same on ``device``."""
        return Batch(
            inputs=tuple(value.to(device, non_blocking=True) for value in self.inputs),
            labels=self.labels.to(device, non_blocking=True),
            mask=self.mask.to(device, non_blocking=True),
            rows=self.rows,
        )


def plan_pieces(data: ClickData, max_candidates: int) -> NDArray[np.int64]:
    """Contexts cut into pieces of at most ``max_candidates`` rows.

    Returns:
        int64 [P, 3]: context, first row, row after the last.
    """
    if max_candidates < 1:
        raise ValueError(f"max_candidates must be at least 1, got {max_candidates}")
    sizes = np.diff(data.offsets)
    counts = -(-sizes // max_candidates)
    contexts = np.repeat(np.arange(data.num_contexts), counts)
    first_of_context = np.repeat(np.cumsum(counts) - counts, counts)
    starts = data.offsets[contexts] + (np.arange(len(contexts)) - first_of_context) * max_candidates
    ends = np.minimum(starts + max_candidates, data.offsets[contexts + 1])
    return np.stack([contexts, starts, ends], axis=1)


def plan_batches(
    data: ClickData,
    *,
    batch_contexts: int,
    max_candidates: int,
    seed: int | None,
) -> list[NDArray[np.int64]]:
    """Pieces of similar history length together, ``batch_contexts`` at a time.

    Args:
        data: The data set.
        batch_contexts: B.
        max_candidates: Most candidates of one piece.
        seed: Of the order; None = by length, for scoring.
    """
    pieces = plan_pieces(data, max_candidates)
    lengths = data.history_lengths[pieces[:, 0]]
    if seed is None:
        pieces = pieces[np.lexsort((pieces[:, 2] - pieces[:, 1], lengths))]
        return [pieces[i : i + batch_contexts] for i in range(0, len(pieces), batch_contexts)]
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(pieces))
    pool = batch_contexts * POOL_BATCHES
    batches: list[NDArray[np.int64]] = []
    for start in range(0, len(order), pool):
        part = order[start : start + pool]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [
            pieces[part[i : i + batch_contexts]] for i in range(0, len(part), batch_contexts)
        ]
    generator.shuffle(batches)
    return batches


def count_batches(data: ClickData, *, batch_contexts: int, max_candidates: int) -> int:
    """Length of every plan that :func:`plan_batches` makes with these sizes."""
    return -(-len(plan_pieces(data, max_candidates)) // batch_contexts)


def split_batch(
    pieces: NDArray[np.int64], batch_contexts: int, *, num_processes: int, process_index: int
) -> Iterator[tuple[NDArray[np.int64], float]]:
    """One process' share of a batch, in passes.

    Neighbours have histories of like length, so every n-th is a fair share. A pass with fewer
    contexts than processes is computed by all of them as a whole: each must take part, for they
    add up statistics in between.

    Args:
        pieces: int64 [B, 3] of :func:`plan_batches`.
        batch_contexts: Most contexts of a pass, all processes together.
        num_processes: How many share the work.
        process_index: Which one asks.

    Returns:
        Per pass its pieces, int64 [b, 3], and the weight of their rows: over all processes, the
        weights of a row add up to 1.
    """
    for start in range(0, len(pieces), batch_contexts):
        part = pieces[start : start + batch_contexts]
        if len(part) < num_processes:
            yield part, 1 / num_processes
        else:
            yield part[process_index::num_processes], 1.0


def make_batch(data: ClickData, pieces: NDArray[np.int64], *, truncate: bool) -> Batch:
    """Gather the arrays of one batch.

    Args:
        data: The data set.
        pieces: int64 [B, 3] of :func:`plan_pieces`.
        truncate: Cut histories to the longest of the batch, at least 1; False keeps all of M, as an
            exported program wants it.
    """
    contexts, starts, ends = pieces.T
    users, items = data.users, data.items
    length = users.history_rows.shape[-1]
    if truncate:
        length = max(1, int(data.history_lengths[contexts].max()))
    newest = slice(-length, None)
    places = np.arange(int((ends - starts).max()))
    mask = places < (ends - starts)[:, None]
    rows = np.where(mask, starts[:, None] + places, starts[:, None])

    def candidates(values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values[rows])

    keys = np.where(mask, items.candidate_item_keys[rows], 0)
    return Batch(
        inputs=(
            torch.from_numpy(users.history_rows[contexts][..., newest]),
            torch.from_numpy(users.history_item_keys[contexts][..., newest]),
            torch.from_numpy(users.history_ages[contexts][..., newest]),
            torch.from_numpy(users.history_totals[contexts]),
            torch.from_numpy(users.user_dense[contexts]),
            candidates(items.candidate_rows),
            torch.from_numpy(keys),
            candidates(items.candidate_dense),
            candidates(items.candidate_categories),
            candidates(data.context),
            candidates(data.evidence),
        ),
        labels=candidates(data.clicked).float(),
        mask=torch.from_numpy(mask),
        rows=rows[mask],
    )


def iterate(data: ClickData, plan: list[NDArray[np.int64]], *, truncate: bool) -> Iterator[Batch]:
    """The batches of a plan, one after the other."""
    for pieces in plan:
        yield make_batch(data, pieces, truncate=truncate)
