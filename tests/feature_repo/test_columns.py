"""Stored columns against the features of a view."""

import numpy as np
import pyarrow as pa
import pytest

from feature_repo.columns import Ragged, check_columns
from feature_repo.errors import StoreError
from feature_repo.feast_bytes import VALUE_FIELDS
from tests.feature_repo.online_stores import ARROW, TYPES

KINDS = {name: VALUE_FIELDS[dtype] for name, dtype in TYPES.items()}


def test_every_type_fits_its_own_column_and_one_without_values() -> None:
    check_columns("view", KINDS, pa.schema(ARROW))
    check_columns("view", KINDS, pa.schema({**ARROW, "brand": pa.null(), "more": pa.date32()}))


@pytest.mark.parametrize("name", KINDS)
def test_other_columns_are_refused(name: str) -> None:
    others = [kind for kind in ARROW.values() if kind != ARROW[name]]
    if name in ("rate", "price"):  # a number is a number
        others = [kind for kind in others if not pa.types.is_floating(kind)]
    for other in others:
        with pytest.raises(StoreError, match=f"{name} of view is .*run `longtrail apply`"):
            check_columns("view", KINDS, pa.schema({**ARROW, name: other}))
    without = {column: kind for column, kind in ARROW.items() if column != name}
    with pytest.raises(StoreError, match=f"{name} of view is missing"):
        check_columns("view", KINDS, pa.schema(without))


def test_lists_are_aligned_to_the_right() -> None:
    """More lists than are aligned at once; each with its last numbers, its newest behaviours."""
    random = np.random.default_rng(0)
    lengths = random.integers(0, 12, size=10_000)
    lists = [random.integers(1, 2**62, size=length) for length in lengths]
    dense = Ragged(np.concatenate(lists), lengths).right_aligned(7)
    assert dense.shape == (10_000, 7)
    for row, numbers in zip(dense, lists, strict=True):
        kept = numbers[-7:]
        assert row.tolist() == [0] * (7 - len(kept)) + kept.tolist()
    nothing = Ragged(np.zeros(0, dtype=np.float32), np.zeros(3, dtype=np.int64)).right_aligned(2)
    assert nothing.tolist() == [[0, 0]] * 3
    assert nothing.dtype == np.float32
