"""Scores of a whole data set, by a model or by an exported program."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoders.devices import Devices
from feature_repo.progress import Progress, silent
from training.batches import iterate, plan_batches
from training.bootstrap import Scores
from training.dataset import ClickData

BATCH_CONTEXTS = 64
MAX_CANDIDATES = 64


def score(
    model: Callable[..., Tensor],
    table: Tensor,
    data: ClickData,
    *,
    truncate: bool,
    progress: Progress = silent,
    devices: Devices | None = None,
) -> NDArray[np.float32]:
    """Logits of every row.

    Args:
        model: Takes the program's inputs.
        table: float32 [V, D], on the model's device.
        data: R rows.
        truncate: Cut histories to the longest of a batch: for eager models; an exported program
            wants all of M.
        progress: Told the rows scored.
        devices: Whose processes share the batches, all of them calling this; None = this process
            scores everything. The scores are the same bits either way.

    Returns:
        float32 [R], in the data's order.
    """
    plan = plan_batches(
        data, batch_contexts=BATCH_CONTEXTS, max_candidates=MAX_CANDIDATES, seed=None
    )
    if devices is not None:
        plan = plan[devices.process_index :: devices.num_processes]
    logits = np.zeros(len(data), dtype=np.float32)
    with torch.inference_mode():
        for batch in iterate(data, plan, truncate=truncate):
            batch = batch.to(table.device)
            logits[batch.rows] = model(table, *batch.inputs)[batch.mask].cpu().numpy()
            progress(len(batch.rows), len(data))
    if devices is not None and devices.num_processes > 1:
        # Each row was scored by one process and is 0 in the others.
        logits = devices.add_up(torch.from_numpy(logits).to(devices.device)).cpu().numpy()
    return logits


def probabilities(logits: Scores) -> NDArray[np.float64]:
    """Logistic function, without overflow."""
    return np.exp(-np.logaddexp(0, -logits.astype(np.float64)))
