"""The training benchmark: our steps learn, turns are counted, a missing FuxiCTR is said."""

import importlib.util

import click
import pytest

from benchmarks.bench_training import Sizes, fuxictr_step, measure, our_step

SIZES = Sizes(num_rows=16, length=5, num_items=20, vector_width=12)


@pytest.mark.parametrize("texts", [False, True], ids=["ids", "texts"])
@pytest.mark.parametrize("num_candidates", [1, 4])
def test_our_steps_lower_the_loss_of_their_batch(texts, num_candidates):
    step = our_step(SIZES, texts=texts, num_candidates=num_candidates)
    losses = [step() for _ in range(40)]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.01


def test_turns_are_taken_by_all_and_the_first_is_not_counted():
    taken: list[str] = []
    steps = {name: (lambda name=name: taken.append(name)) for name in ("a", "b")}
    rates = measure(steps, 10, num_rounds=3, steps_per_turn=2)
    assert "".join(taken) == "aabb" * 4
    assert {name: len(values) for name, values in rates.items()} == {"a": 3, "b": 3}


def test_fuxictr_learns_or_its_absence_is_said():
    if importlib.util.find_spec("fuxictr") is None:
        with pytest.raises(click.ClickException, match="pip install fuxictr"):
            fuxictr_step(SIZES, texts=False)
    else:
        step = fuxictr_step(SIZES, texts=False)
        losses = [step() for _ in range(40)]
        assert losses[-1] < losses[0]
