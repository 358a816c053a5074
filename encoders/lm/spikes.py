"""Steps whose loss leaps: a batch of broken text, or a training that begins to diverge."""

import math
from collections.abc import Sequence
from statistics import median

WINDOW = 50
"""Steps that a loss is compared with."""
_LEAST = 20
"""Steps before which nothing is a spike: the loss still falls fast."""
_DEVIATIONS = 6.0
"""Of the window, by its median distance to the median: a falling loss has outliers."""
_NORMAL = 1.4826
"""A normal distribution's standard deviation over its median distance to the median."""
_NATS = 0.5
"""A smaller leap is none, however even the steps before were."""


def is_spike(loss: float, recent: Sequence[float]) -> bool:
    """Whether a loss leaps out of those of the steps before.

    Args:
        loss: In nats per token.
        recent: Losses of at most :data:`WINDOW` steps before, spikes left out.

    Source:
        Chowdhery et al., "PaLM", 2022, arXiv:2204.02311, section 5.1: batches at which the loss
        spiked were left out. Theirs went back and skipped hundreds; here the step itself is.
    """
    if not math.isfinite(loss) or len(recent) < _LEAST:
        return False
    middle = median(recent)
    deviation = _NORMAL * median(abs(other - middle) for other in recent)
    return loss > middle + max(_NATS, _DEVIATIONS * deviation)
