"""Optimiser and moving average of the weights."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from training.recipes import TrainingConfig

Tensors = tuple[Tensor, ...] | list[Tensor]


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with four groups: the deep half and the rest, each with and without weight decay.

    Vectors (biases, norms, scales) and embedding tables are not decayed, frozen weights left out.
    Each group carries its highest learning rate as ``peak``.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        deep = ".deep_half." in f".{name}"
        decayed = parameter.dim() > 1 and id(parameter) not in tables
        groups.setdefault((deep, decayed), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "peak": config.deep_learning_rate if deep else config.learning_rate,
                "weight_decay": config.weight_decay if decayed else 0.0,
            }
            for (deep, decayed), parameters in sorted(groups.items())
        ],
        lr=config.learning_rate,
        fused=True,  # one pass over the weights: memory is what bounds it,
    )


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group its peak times ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights; buffers are copied.

    The decay starts low, ``(1 + n) / (10 + n)``, so that a short run does not average in the
    random start.

    Args:
        model: Whose weights are averaged.
        decay: Per step, in ``(0, 1)``.
    """

    def update(averaged: Tensors, current: Tensors, number: Tensor | int) -> None:
        now = min(decay, (1 + float(number)) / (10 + float(number)))
        torch._foreach_lerp_(list(averaged), list(current), 1 - now)

    return AveragedModel(model, multi_avg_fn=update)
