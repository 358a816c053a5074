"""Feature values in one form, wherever they were read: the reader's raw material.

A scalar feature is an array of R values; a list feature is :class:`Ragged`. Missing is null in
every store, and so is expired: Feast applies a view's time to live offline only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from feature_repo.errors import StoreError

_BLOCK_ROWS = 4096
"""Lists that are aligned at once: their places stay in the processor's cache."""


@dataclass(frozen=True)
class Ragged:
    """R lists end to end.

    Args:
        values: int64 or float32 [sum of lengths].
        lengths: int64 [R]; a missing list has length 0.
    """

    values: NDArray[np.int64] | NDArray[np.float32]
    lengths: NDArray[np.int64]

    def right_aligned(self, width: int) -> NDArray[Any]:
        """Dense [R, width], zeros to the left; the last ``width`` of longer lists."""
        dense = np.zeros((len(self.lengths), width), dtype=self.values.dtype)
        ends = np.cumsum(self.lengths)
        place = np.arange(width)
        for start in range(0, len(dense), _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            kept = np.minimum(self.lengths[block], width)[:, None]
            is_there = place >= width - kept
            source = (ends[block, None] - width + place)[is_there]
            dense[block][is_there] = self.values[source]
        return dense


Column = Ragged | NDArray[Any]


@dataclass(frozen=True)
class Columns:
    """Features of R keys.

    Args:
        present: bool [R]; whether the view has a row for the key that is not expired.
        values: Feature name -> its column. Scalars are float32 or float64 with NaN for null,
            int64 with 0 for null, or str objects with None for null.
    """

    present: NDArray[np.bool_]
    values: dict[str, Column]


def column_from_arrow(array: pa.ChunkedArray | pa.Array) -> Column:
    """A column as it comes out of parquet or of Feast's historical retrieval.

    Raises:
        TypeError: If its type is none that features have.
    """
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
        if isinstance(array, pa.ChunkedArray):  # several chunks beyond 2 GiB, or none at all
            array = pa.concat_arrays(array.chunks) if array.num_chunks else array.type
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        values = array.flatten().to_numpy(zero_copy_only=False)
        wanted: type[np.generic] = np.int64 if pa.types.is_integer(kind.value_type) else np.float32
        return Ragged(values.astype(wanted, copy=False), lengths.astype(np.int64))
    if pa.types.is_integer(kind):
        # Through fill_null: a null would turn the column into floats and cut ids above 2**53.
        return np.asarray(pc.fill_null(array, 0).cast(pa.int64()))
    if pa.types.is_floating(kind):
        values = array.to_numpy(zero_copy_only=False)
        wanted = np.float64 if kind == pa.float64() else np.float32
        return np.asarray(values, dtype=wanted)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return np.array(array.to_pylist(), dtype=object)
    if pa.types.is_null(kind):
        return np.full(len(array), np.nan, dtype=np.float32)
    raise TypeError(f"no feature has the type {kind}")


def check_columns(view: str, kinds: Mapping[str, str], schema: pa.Schema) -> None:
    """Make sure that stored columns are those that a view was applied with.

    Between a build with other columns and ``longtrail apply`` they are not.

    Args:
        view: Name of the view.
        kinds: Feature -> field of ``Value`` that its values set, such as ``float_val``.
        schema: Of the rows in the offline store.

    Raises:
        StoreError: If a feature is not there, or of another type.
    """
    for name, kind in kinds.items():
        place = schema.get_field_index(name)
        found = schema.field(place).type if place >= 0 else None
        if found is None or not (pa.types.is_null(found) or _fits(found, kind)):
            raise StoreError(
                f"{name} of {view} is {found or 'missing'} in the offline store, but was applied "
                f"as {kind.removesuffix('_val')}: run `longtrail apply`, then `longtrail "
                "materialize`"
            )


def _fits(found: pa.DataType, kind: str) -> bool:
    """Whether stored values are of the type of a feature."""
    if kind in _LISTS:
        is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
        return is_list and _fits(found.value_type, kind.replace("_list", ""))
    if kind == "string_val":
        return bool(pa.types.is_string(found) or pa.types.is_large_string(found))
    of_kind = pa.types.is_integer if kind == "int64_val" else pa.types.is_floating
    return bool(of_kind(found))


_LISTS = {"int64_list_val": np.int64, "float_list_val": np.float32}
_SCALARS = {"int64_val": np.int64, "float_val": np.float32, "double_val": np.float64}


def column_from_values(values: Any, valid: NDArray[np.bool_], kind: str) -> Column:
    """A column of Feast's online response.

    Args:
        values: R protobuf ``Value`` messages.
        valid: bool [R]; False where the row is missing or expired.
        kind: Field of ``Value`` that a value of this feature sets, such as ``float_val``.
    """
    filled = [ok and value.HasField(kind) for value, ok in zip(values, valid, strict=True)]
    if kind in _LISTS:
        parts = [
            np.array(getattr(value, kind).val, dtype=_LISTS[kind])
            for value, ok in zip(values, filled, strict=True)
            if ok
        ]
        lengths = np.zeros(len(filled), dtype=np.int64)
        lengths[filled] = [len(part) for part in parts]
        flat = np.concatenate(parts) if parts else np.empty(0, dtype=_LISTS[kind])
        return Ragged(flat, lengths)
    if kind in _SCALARS:
        dtype = _SCALARS[kind]
        missing = 0 if dtype is np.int64 else np.nan
        return np.array(
            [getattr(v, kind) if ok else missing for v, ok in zip(values, filled, strict=True)],
            dtype=dtype,
        )
    return np.array(
        [v.string_val if ok else None for v, ok in zip(values, filled, strict=True)], dtype=object
    )
