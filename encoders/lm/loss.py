"""The loss over a large vocabulary, without ever holding the logits of all tokens.

Shapes: N = tokens of a pass, D = width, V = vocabulary, B = rows, T = tokens of a row.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

IGNORED = -100
"""Target of a position that is not learned from, torch's own choice."""
_BLOCK_LOGITS = 1 << 25
"""Logits held at once, and multiplied at once for the gradient of the output's weights."""
_CHUNK_LOGITS = 3 << 20
"""Of these, made and normalised at once on a CPU, while they are in its cache. With 22,518 tokens
and D = 256, 4096 tokens took .43 s of one core forward and backward in bfloat16; chunk by chunk of
float32 .74 s, their matrix products alone .33 s."""
_LEAST_LIKELY = 1e-38
"""A target's probability below it counts as it: 87 nats."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the negative log likelihoods; both gradients are made on the way forward.

    Source:
        Hsu et al., "Liger Kernel", 2024, arXiv:2410.10989, fused linear cross-entropy.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, dtype: Any) -> Tensor:
        rows, table = states.to(dtype), weight.to(dtype)
        to_rows = torch.empty_like(rows)
        to_weight = torch.zeros_like(weight, dtype=torch.float32)
        total = states.new_zeros((), dtype=torch.float32)
        size = max(1, _BLOCK_LOGITS // len(weight))
        chunk = _chunk_rows(len(weight), states.device)
        slopes = rows.new_empty(min(size, len(rows)), len(weight))
        for first in range(0, len(rows), size):
            block = slice(first, min(first + size, len(rows)))
            for start in range(block.start, block.stop, chunk):
                part = slice(start, min(start + chunk, block.stop))
                told = targets[part, None]
                # Probabilities; less one at the target, they are the logits' gradient.
                slope = slopes[part.start - first : part.stop - first]
                torch.softmax(functional.linear(rows[part], table), 1, out=slope)
                chances = slope.gather(1, told).float().clamp_min(_LEAST_LIKELY)
                total -= chances.log().sum()
                slope.scatter_add_(1, told, slope.new_full(told.shape, -1.0))
                to_rows[part] = slope @ table
            to_weight += slopes[: block.stop - first].T @ rows[block]
        ctx.save_for_backward(to_rows.to(states.dtype), to_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        to_rows, to_weight = ctx.saved_tensors
        return to_rows * slopes[0], to_weight * slopes[0], None, None


class LanguageModelLoss(nn.Module):
    """A causal model with its loss in one module, which torch can shard and compile as a whole.

    Args:
        model: Of transformers, with a linear head over the vocabulary, without a bias.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        inputs: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"],
        positions: Int[Tensor, "B T"] | None = None,
        *,
        by_token: bool = False,
    ) -> Tensor:
        """Sum of the targets' negative log likelihoods in nats, float32.

        Args:
            inputs: Token ids.
            targets: What to tell at each position; :data:`IGNORED` is left out.
            positions: Place of each token in its document; where it does not go up by one another
                document begins, and attention does not cross. None = each row is one document.
            by_token: Return every position's, float32 [B, T], 0 where left out, without gradients.
        """
        states = self.model.base_model(
            input_ids=inputs, position_ids=positions, use_cache=False
        ).last_hidden_state.flatten(0, 1)
        weight = self.model.get_output_embeddings().weight
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        kept = targets.flatten() != IGNORED
        told = targets.flatten()[kept]
        if by_token:
            each: Tensor = states.new_zeros(targets.shape, dtype=torch.float32)
            each.view(-1)[kept] = _nats(states[kept].to(dtype), weight.to(dtype), told)
            return each
        if not bool(kept.all()):
            states = states[kept]
        nats: Tensor = _ChunkedCrossEntropy.apply(states, weight, told, dtype)  # type: ignore[no-untyped-call]
        return nats


@torch.no_grad()
def _nats(
    states: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """Negative log likelihood of each target, chunk by chunk."""
    size = _chunk_rows(len(weight), states.device)
    parts = [
        functional.cross_entropy(functional.linear(rows, weight).float(), told, reduction="none")
        for rows, told in zip(torch.split(states, size), torch.split(targets, size), strict=True)
    ]
    return torch.cat(parts)


def _chunk_rows(num_tokens: int, device: torch.device) -> int:
    """Rows of logits over a vocabulary that are made at once."""
    logits = _CHUNK_LOGITS if device.type == "cpu" else _BLOCK_LOGITS
    return max(1, logits // num_tokens)
