"""Stored columns against the features of a view."""

import pyarrow as pa
import pytest

from feature_repo.columns import check_columns
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
