"""The optimiser of a language model, and its state as tensors by name."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from encoders.checkpoint import optimizer_tensors, without_prefix
from encoders.lm.recipes import LearningConfig
from encoders.lm.sharding import share_of, whole


def make_optimizer(parameters: Sequence[nn.Parameter], config: LearningConfig) -> torch.optim.AdamW:
    """AdamW; matrices and embeddings are decayed, vectors are not."""
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        fused=True,  # one pass over the weights: memory is what bounds it
    )


def learning_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and the optimiser's moments, whole where processes share them: all call this."""
    weights = whole({f"model/{name}": p for name, p in model.named_parameters()})
    return weights | whole(optimizer_tensors(model, optimizer))


@torch.no_grad()
def restore_learning(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what :func:`learning_tensors` gave; every process takes its share."""
    weights = without_prefix("model", tensors)
    for name, parameter in model.named_parameters():
        parameter.copy_(share_of(weights[name], parameter))
        moments = without_prefix(f"optimizer/{name}", tensors)
        if moments:
            optimizer.state[parameter] = {
                key: share_of(value, parameter) for key, value in moments.items()
            }
