"""Feature fields: the one truth from which files are written and Feast views are declared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

FieldType = Literal["int64", "float32", "float64", "string", "int64_list", "float32_list"]

EVENT_TIMESTAMP = "event_timestamp"
"""Moment from which a row can be read: time of its source plus the availability delay."""
CREATED_TIMESTAMP = "created_timestamp"
"""Equal to :data:`EVENT_TIMESTAMP`, so that building twice gives equal files."""

_TIMESTAMP = pa.timestamp("us", tz="UTC")
_ARROW_TYPES: dict[FieldType, pa.DataType] = {
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "string": pa.string(),
    "int64_list": pa.list_(pa.int64()),
    "float32_list": pa.list_(pa.float32()),
}


@dataclass(frozen=True)
class FeatureField:
    """A column of a feature view.

    Args:
        name: Column name, lower case with underscores.
        type: ``int64`` and ``int64_list`` are never null; the others may be.
        description: What it holds, with the unit, and when it is null.
    """

    name: str
    type: FieldType
    description: str


def arrow_schema(entity: str, fields: Sequence[FeatureField]) -> pa.Schema:
    """Columns of a view's files: entity, the two timestamps, then the fields in order.

    The files need not carry the schema's nullability: the query engine writes what it knows.
    """
    return pa.schema(
        [
            pa.field(entity, pa.string(), nullable=False),
            pa.field(EVENT_TIMESTAMP, _TIMESTAMP, nullable=False),
            pa.field(CREATED_TIMESTAMP, _TIMESTAMP, nullable=False),
            *(
                pa.field(
                    field.name,
                    _ARROW_TYPES[field.type],
                    nullable=field.type not in ("int64", "int64_list"),
                )
                for field in fields
            ),
        ]
    )
