"""How fast this machine multiplies, and what share of that a training reaches.

The share compares the training's matrix products, 6 operations per weight and token (forward, and
twice as much backward), with the time that these very products take alone, at the model's shapes
and in its arithmetic. Attention's products are not counted, the time that they take is.

Shapes: N = tokens of a pass, I = inputs of a product, O = outputs.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from encoders.config import Precision

OPERATIONS_PER_WEIGHT = 6
"""Of a token's forward and backward pass: Kaplan et al., "Scaling Laws for Neural Language Models",
2020, arXiv:2001.08361, section 2.1."""
_SECONDS = 0.15
"""For which each shape is timed."""

PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L4": 121e12,
    "L40S": 362e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}
"""Card -> bfloat16 operations per second without sparsity, of the makers' data sheets."""


def product_shapes(model: Any) -> Counter[tuple[int, int]]:
    """(O, I) of every matrix product with weights that a token passes -> how many there are."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return Counter((linear.out_features, linear.in_features) for linear in linears)


def operations_per_token(shapes: Counter[tuple[int, int]]) -> int:
    """Of all products with weights, forward and backward."""
    weights = sum(outputs * inputs * number for (outputs, inputs), number in shapes.items())
    return OPERATIONS_PER_WEIGHT * weights


def card_peak(device: torch.device) -> float | None:
    """Operations per second that an accelerator's maker promises; None where we know it not."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # The longest first, for "L4" is part of "L40S".
    for card in sorted(PEAK_FLOPS, key=len, reverse=True):
        if card in name:
            return PEAK_FLOPS[card]
    return None


def measure_products(
    shapes: Counter[tuple[int, int]],
    *,
    num_tokens: int,
    precision: Precision,
    device: torch.device,
) -> float:
    """Operations per second of a pass' matrix products alone, all of them one after the other.

    Args:
        shapes: Of :func:`product_shapes`.
        num_tokens: N.
        precision: Of the products.
        device: Where.
    """
    dtype = getattr(torch, precision)
    seconds = operations = 0.0
    for (outputs, inputs), number in shapes.items():
        given = torch.randn(num_tokens, inputs, device=device).to(dtype)
        weight = torch.randn(outputs, inputs, device=device).to(dtype)
        slope = torch.randn(num_tokens, outputs, device=device).to(dtype)
        for times in _timed(given, weight, slope):
            seconds += number * times
        operations += number * OPERATIONS_PER_WEIGHT * num_tokens * inputs * outputs
    return operations / seconds


def _timed(given: Tensor, weight: Tensor, slope: Tensor) -> Iterator[float]:
    """Seconds of the product forward and of the two backward; the fastest of several."""
    products: tuple[Callable[[], Tensor], ...] = (
        lambda: functional.linear(given, weight),  # (N, I) x (O, I) -> (N, O)
        lambda: slope @ weight,  # the inputs' gradient, (N, I)
        lambda: slope.T @ given,  # the weights' gradient, (O, I)
    )
    for product in products:
        product()
        best = float("inf")
        end = time.perf_counter() + _SECONDS
        while time.perf_counter() < end:
            started = time.perf_counter()
            product()
            if given.device.type == "cuda":
                torch.cuda.synchronize(given.device)
            best = min(best, time.perf_counter() - started)
        yield best
