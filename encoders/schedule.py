"""The learning rate's way through a run."""

import math


def warmup_cosine(step: int, *, num_steps: int, warmup_steps: int, final: float = 0.0) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine down to ``final``.

    Args:
        step: From 0.
        num_steps: Of the whole run.
        warmup_steps: Wanted; at most a tenth of all steps is used.
        final: In [0, 1].
    """
    warmup = min(warmup_steps, num_steps // 10)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    share = (step - warmup) / max(1, num_steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
