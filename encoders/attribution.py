"""What each past behaviour adds to the logits of items for one user.

Method: occlusion, also called leaving one out. A behaviour's contribution is

    score(the whole history) - score(the history without that behaviour)

in logits: positive where the behaviour speaks for the item. That is exact for whatever the program
computes (ids, counts, text, trees alike), needs no gradients, and an exported program does it.

Limits. Contributions do not add up to the whole: two behaviours that say the same hide each other,
and each seems to add nothing; so behaviours of one scene with the same text are left out together
by default. Features that were computed before the request (the user's and the item's dense columns,
the item's neighbours) stay as they are, whatever they count: what a behaviour does through them is
not seen. A left-out behaviour leaves its place empty; the others keep their positions and ages.
Differences near rounding (1e-5) mean nothing.

The whole kept history is looked at, beyond what the program reads of it: a behaviour too old for
the program still speaks through the evidence, which is counted anew without it.

Shapes: S = scenes, N = behaviours kept per scene, G = behaviours or groups looked at, T = items,
B = contexts of one call; the others as in :data:`feature_repo.artifact.PROGRAM_INPUTS`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoders.evidence import candidate_evidence
from encoders.inputs import ItemInputs, UserInputs
from encoders.table import EmbeddingTable

DEFAULT_MAX_BEHAVIORS = 50
CHUNK_CONTEXTS = 64
"""B, the most histories in one call of the program: bounds the memory."""
CHUNK_CANDIDATES = 512
"""B x T, likewise; of more than so many items every call has one history."""


@dataclass(frozen=True)
class Attribution:
    """Contributions to the logits of T items, newest behaviour first.

    Args:
        logits: float32 [T]; with the whole history.
        logits_without_history: float32 [T]; with every behaviour of every scene left out.
        scene_index: int64 [G]; in the order of the program's scenes.
        position: int64 [G]; place in ``history_rows[0, scene]``, of a group's newest behaviour.
        count: int64 [G]; behaviours that were left out together.
        contributions: float32 [G, T]; logits.
    """

    logits: NDArray[np.float32]
    logits_without_history: NDArray[np.float32]
    scene_index: NDArray[np.int64]
    position: NDArray[np.int64]
    count: NDArray[np.int64]
    contributions: NDArray[np.float32]

    def __len__(self) -> int:
        """G."""
        return len(self.contributions)

    def strongest(self, number: int, item: int = 0) -> NDArray[np.int64]:
        """The largest contributions to an item by size, at most ``number``, largest first."""
        order = np.argsort(-np.abs(self.contributions[:, item]), kind="stable")
        return order[:number].astype(np.int64)


def attribute(
    score: Callable[..., Tensor],
    table: EmbeddingTable,
    user: UserInputs,
    items: ItemInputs,
    context: NDArray[np.float32],
    *,
    sequence_length: int,
    max_behaviors: int = DEFAULT_MAX_BEHAVIORS,
    group_by_text: bool = True,
) -> Attribution:
    """Leave behaviours out, one by one or text by text, and see what the logits do.

    Cost: the program on ``G + 2`` contexts of T candidates each, some of them in one call (see
    :data:`CHUNK_CANDIDATES`), and the evidence of T candidates ``G + 2`` times.

    Args:
        score: The program: takes its inputs in order, gives logits [B, T].
        table: Vectors of the texts.
        user: Inputs of exactly one user, the whole kept history.
        items: Inputs of T items, with their neighbours.
        context: float32 [Fx]; NaN = missing.
        sequence_length: M, the newest behaviours per scene that the program reads.
        max_behaviors: Look at the newest ones only, at least 1; of groups, at those whose newest
            behaviours are the newest. A group is always left out as a whole.
        group_by_text: Leave out together what has the same text (or, where a text is not in the
            table, the same item) in the same scene.

    Raises:
        ValueError: If there is not exactly one user, or ``max_behaviors`` is below 1.
    """
    if len(user.history_rows) != 1:
        raise ValueError(f"attribution is for one user, got {len(user.history_rows)}")
    if max_behaviors < 1:
        raise ValueError(f"max_behaviors must be at least 1, got {max_behaviors}")
    groups, first = _groups(user, max_behaviors, group_by_text=group_by_text)
    there = (user.history_rows[0] != 0) | (user.history_item_keys[0] != 0)
    # Beside the groups: nothing left out, and everything. All of them in the same calls.
    without = np.concatenate([groups, np.zeros_like(there)[None], there[None]])
    logits = np.concatenate(
        [
            _logits(score, table, variants.last(sequence_length), items, context, evidence)
            for variants, evidence in _variants(table, user, items, without)
        ]
    )
    return Attribution(
        logits=logits[-2],
        logits_without_history=logits[-1],
        scene_index=first[:, 0],
        position=first[:, 1],
        count=groups.sum(axis=(1, 2), dtype=np.int64),
        contributions=logits[-2] - logits[:-2],
    )


def _groups(
    user: UserInputs, max_behaviors: int, *, group_by_text: bool
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """What is left out together, newest first.

    Returns:
        bool [G, S, N], True = left out; and scene and position of each group's newest, [G, 2].
    """
    rows, keys = user.history_rows[0], user.history_item_keys[0]
    scenes, places = np.nonzero((rows != 0) | (keys != 0))
    order = np.lexsort((scenes, -places, user.history_ages[0][scenes, places]))
    scenes, places = scenes[order], places[order]
    rows_there = rows[scenes, places]
    # Behaviours are told apart by scene and text, by the item where the text is not in the table.
    # Without grouping every one of them is a thing of its own.
    kinds = np.stack(
        [scenes, rows_there, np.where(rows_there == 0, keys[scenes, places], 0)]
        if group_by_text
        else [np.arange(len(scenes))],
        axis=1,
    )
    _, newest, kind = np.unique(kinds, axis=0, return_index=True, return_inverse=True)
    chosen = np.argsort(newest)[:max_behaviors]  # of each kind the first in order is its newest
    groups = np.zeros((len(chosen), *rows.shape), dtype=bool)
    groups[:, scenes, places] = kind.reshape(-1) == chosen[:, None]
    first = newest[chosen]
    return groups, np.stack([scenes[first], places[first]], axis=1).astype(np.int64)


def _variants(
    table: EmbeddingTable, user: UserInputs, items: ItemInputs, without: NDArray[np.bool_]
) -> Iterator[tuple[UserInputs, NDArray[np.float32]]]:
    """The user without what is marked in bool [G, S, N], and the evidence [B, T, E] of that."""
    num_items = len(items.candidate_rows)
    num_contexts = min(CHUNK_CONTEXTS, max(1, CHUNK_CANDIDATES // max(1, num_items)))
    for start in range(0, len(without), num_contexts):
        chunk = without[start : start + num_contexts]
        totals = np.maximum(user.history_totals - chunk.sum(axis=-1), 0).astype(np.float32)
        variants = UserInputs(
            history_rows=np.where(chunk, 0, user.history_rows),
            history_item_keys=np.where(chunk, 0, user.history_item_keys),
            history_ages=np.where(chunk, np.float32(0), user.history_ages),
            history_totals=totals,
            user_dense=np.repeat(user.user_dense, len(chunk), axis=0),
        )
        evidence = [candidate_evidence(variants, row, items, table) for row in range(len(chunk))]
        yield variants, np.stack(evidence)


def _logits(
    score: Callable[..., Tensor],
    table: EmbeddingTable,
    users: UserInputs,
    items: ItemInputs,
    context: NDArray[np.float32],
    evidence: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Logits [B, T] of T items for B contexts."""
    num = len(evidence)
    columns = np.repeat(context[None], len(items.candidate_rows), axis=0)
    inputs = (
        table.vectors,
        users.history_rows,
        users.history_item_keys,
        users.history_ages,
        users.history_totals,
        users.user_dense,
        *(
            np.repeat(values[None], num, axis=0)
            for values in (
                items.candidate_rows,
                items.candidate_item_keys,
                items.candidate_dense,
                items.candidate_categories,
                columns,
            )
        ),
        evidence,
    )
    with torch.inference_mode():
        logits = score(*(torch.from_numpy(np.ascontiguousarray(values)) for values in inputs))
    return logits.numpy()
