"""A leap is told from the noise of steps."""

import math

import numpy as np

from encoders.lm.spikes import WINDOW, is_spike


def test_leaps_are_spikes_and_noise_is_not() -> None:
    random = np.random.default_rng(0)
    recent = list(random.normal(3.0, 0.05, size=WINDOW))
    assert not is_spike(3.3, recent)  # six deviations, but small
    assert is_spike(3.6, recent)
    noisy = list(random.normal(3.0, 0.5, size=WINDOW))
    assert not is_spike(5.0, noisy)
    assert is_spike(9.0, noisy)


def test_nothing_is_a_spike_at_the_beginning_or_below() -> None:
    assert not is_spike(50.0, [3.0] * 10)
    assert not is_spike(1.0, [3.0] * WINDOW)
    assert not is_spike(math.inf, [3.0] * WINDOW)  # stops the training elsewhere
