import pytest

from encoders.schedule import warmup_cosine


def test_schedule_by_hand():
    values = [warmup_cosine(s, num_steps=100, warmup_steps=4) for s in (0, 3, 4, 52, 100)]
    assert values == pytest.approx([0.2, 0.8, 1.0, 0.5, 0.0])
    assert warmup_cosine(0, num_steps=5, warmup_steps=60) == 1.0
