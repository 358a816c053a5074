"""The optimisers of a language model, and their state as tensors by name.

AdamW learns everything, or Muon the matrices of the layers and AdamW the rest: embeddings, head and
vectors, which are no maps between hidden states.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from encoders.checkpoint import (
    optimizer_tensors,
    restore_optimizer,
    with_prefix,
    without_prefix,
)
from encoders.devices import Devices
from encoders.lm.recipes import LearningConfig
from encoders.lm.sharding import gather, share_of


def make_optimizers(model: Any, config: LearningConfig) -> list[torch.optim.Optimizer]:
    """One or two, which share out the weights that are learned.

    Matrices and embeddings are decayed, vectors are not.

    Args:
        model: A causal model of transformers.
        config: How; ``learning_rate`` is of AdamW, and Muon's steps are scaled to be as long.

    Source:
        Jordan et al., "Muon", 2024; Liu et al., "Muon is Scalable for LLM Training", 2025,
        arXiv:2502.16982, for the length of its steps; torch's ``Muon``.
    """
    learned = [p for p in model.parameters() if p.requires_grad]
    layers: set[int] = set()
    if config.optimizer == "muon":
        layers = {id(p) for p in model.base_model.layers.parameters() if p.dim() > 1}
    turned = [p for p in learned if id(p) in layers]
    rest = [p for p in learned if id(p) not in layers]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=config.betas,
            fused=True,  # one pass over the weights: memory is what bounds it
        )
    ]
    if turned:
        optimizers.append(
            torch.optim.Muon(
                turned,
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


def learning_tensors(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], devices: Devices
) -> dict[str, Tensor]:
    """Weights and the optimisers' moments, as :func:`encoders.lm.sharding.gather` gives them."""
    tensors = with_prefix("model", dict(model.named_parameters()))
    for optimizer in optimizers:
        tensors |= optimizer_tensors(model, optimizer)
    return gather(tensors, devices)


@torch.no_grad()
def restore_learning(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what :func:`learning_tensors` gave; every process takes its share."""
    weights = without_prefix("model", tensors)
    for name, parameter in model.named_parameters():
        parameter.copy_(share_of(weights[name], parameter))
    for optimizer in optimizers:
        restore_optimizer(model, optimizer, tensors, share_of)
