"""Batches cover all texts, keep their budget, and hold next to no padding."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.batches import TokenizedTexts, plan_batches

LENGTHS = st.lists(st.integers(1, 60), max_size=80).map(
    lambda lengths: np.array(sorted(lengths), dtype=np.int64)
)


@settings(derandomize=True, deadline=None)
@given(lengths=LENGTHS, budget=st.integers(1, 400))
def test_batches_cover_all_texts_within_the_budget(lengths: np.ndarray, budget: int) -> None:
    batches = list(plan_batches(lengths, budget))
    assert [i for batch in batches for i in range(batch.start, batch.stop)] == list(
        range(len(lengths))
    )
    for batch in batches:
        chosen = lengths[batch]
        assert len(chosen) == 1 or len(chosen) * chosen.max() <= budget
        assert chosen.max() * 8 <= chosen.min() * 9


def test_texts_of_one_length_fill_the_budget() -> None:
    lengths = np.array([5] * 25 + [6] * 3, dtype=np.int64)
    assert list(plan_batches(lengths, 50)) == [
        slice(0, 10),
        slice(10, 20),
        slice(20, 25),
        slice(25, 28),
    ]


def test_a_small_batch_takes_texts_that_are_nearly_as_short() -> None:
    lengths = np.array([16, 17, 18, 19], dtype=np.int64)
    assert list(plan_batches(lengths, 1000)) == [slice(0, 3), slice(3, 4)]


def test_blocks_hold_the_texts_and_say_what_is_padding() -> None:
    tokens = TokenizedTexts(
        ids=np.array([7, 8, 1, 2, 3, 9, 9], dtype=np.int64),
        lengths=np.array([2, 3, 2], dtype=np.int64),
    )
    block, mask = tokens.block(np.array([2, 0]), padding_id=0)
    assert block.tolist() == [[9, 9], [7, 8]]
    assert mask is None
    block, mask = tokens.block(np.array([1, 0]), padding_id=5)
    assert block.tolist() == [[1, 2, 3], [7, 8, 5]]
    assert mask is not None
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]
