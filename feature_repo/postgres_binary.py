"""Arrow to and from PostgreSQL's binary COPY format, whole columns at a time.

A row of the format is int16 number of cells, then for each cell int32 size (-1 for null) and its
bytes, all big-endian. An array's bytes are int32 [dimensions, has nulls, element type, length,
lower bound], then int32 size and bytes of each element; an empty array has no length and bound.

Shapes: R = rows, W = bytes of the longest row, C = columns.

Source: PostgreSQL manual, "COPY", section Binary Format; ``array_send`` in ``arrayfuncs.c``.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from feature_repo.errors import StoreError

HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER = b"\xff\xff"

_TIMESTAMP = pa.timestamp("us", tz="UTC")
_BLOCK_BYTES = 4 << 20
"""Bytes of Arrow turned into rows at once; about six times as much is held meanwhile."""
_EPOCH_US = 946_684_800_000_000
"""2000-01-01, from which PostgreSQL counts, in epoch microseconds."""

_SQL_TYPES: tuple[tuple[pa.DataType, str], ...] = (
    (pa.bool_(), "boolean"),
    (pa.int16(), "smallint"),
    (pa.int32(), "integer"),
    (pa.int64(), "bigint"),
    (pa.float32(), "real"),
    (pa.float64(), "double precision"),
    (pa.string(), "text"),
    (_TIMESTAMP, "timestamp with time zone"),
    (pa.list_(pa.int64()), "bigint[]"),
    (pa.list_(pa.float32()), "real[]"),
)
"""Types that are stored, as ``format_type`` of PostgreSQL spells them."""
_STORED_AS = {pa.int8(): pa.int16(), pa.large_string(): pa.string()}
"""Types that PostgreSQL lacks -> the next larger one."""
_NUMBERS = {
    pa.bool_(): ">u1",
    pa.int16(): ">i2",
    pa.int32(): ">i4",
    pa.int64(): ">i8",
    pa.float32(): ">f4",
    pa.float64(): ">f8",
    _TIMESTAMP: ">i8",
}
_ELEMENT_OIDS = {pa.int64(): 20, pa.float32(): 700}

Fixed = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""uint8 [R, W] and int64 [R]: bytes of every row, and how many of them count."""
Flat = tuple[bytes, NDArray[np.int64]]
"""The bytes of all rows end to end, and int64 [R]: how many belong to each."""


def sql_type(arrow: pa.DataType) -> str:
    """PostgreSQL's name of the type in which a column is stored.

    Raises:
        StoreError: If there is none.
    """
    arrow = _stored(arrow)
    for ours, name in _SQL_TYPES:
        if ours == arrow:
            return name
    raise StoreError(
        f"a column of type {arrow} cannot be kept in PostgreSQL; expected one of "
        f"{', '.join(str(ours) for ours, _ in _SQL_TYPES)}"
    )


def arrow_type(sql: str) -> pa.DataType:
    """The Arrow type of a column, by PostgreSQL's name of its type.

    Raises:
        StoreError: If no column of ours has it.
    """
    for arrow, name in _SQL_TYPES:
        if name == sql:
            return arrow
    raise StoreError(
        f"a column of PostgreSQL's type {sql} is not read; expected one of "
        f"{', '.join(name for _, name in _SQL_TYPES)}: was the table changed by hand?"
    )


def encode(batch: pa.RecordBatch) -> Iterator[bytes]:
    """The rows of a batch in blocks, without header and trailer.

    Raises:
        StoreError: If a column has a type that is not stored, or a list holds a null.
    """
    block_rows = max(1, batch.num_rows * _BLOCK_BYTES // max(batch.nbytes, 1))
    for start in range(0, batch.num_rows, block_rows):
        yield _encode_block(batch.slice(start, block_rows))


def decode(rows: Sequence[bytes], schema: pa.Schema) -> pa.RecordBatch:
    """Rows as the server sends them, one ``bytes`` each, without header and trailer."""
    lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
    # A null's value is read and thrown away: there must be bytes to read after the last cell too.
    data = b"".join([*rows, bytes(16)])
    buffer = np.frombuffer(data, dtype=np.uint8)
    place = np.cumsum(lengths) - lengths + 2
    arrays = []
    for field in schema:
        sizes = _read(buffer, place, ">i4").astype(np.int64)
        arrays.append(_decode_column(data, buffer, place + 4, sizes, field.type))
        place = place + 4 + np.maximum(sizes, 0)
    assert (place == np.cumsum(lengths)).all(), "the rows have other columns than expected"
    return pa.record_batch(arrays, schema=schema)


def _stored(arrow: pa.DataType) -> pa.DataType:
    return _STORED_AS.get(arrow, arrow)


def _encode_block(batch: pa.RecordBatch) -> bytes:
    """Numbers of neighbouring columns go side by side; texts and lists are put between them."""
    num_rows = batch.num_rows
    count = np.frombuffer(len(batch.columns).to_bytes(2, "big"), dtype=np.uint8)
    fixed: list[Fixed] = [(np.tile(count, (num_rows, 1)), np.full(num_rows, 2))]
    pieces: list[Flat] = []
    for column in batch.columns:
        of_column, flat = _encode_column(column.cast(_stored(column.type)))
        fixed.append(of_column)
        if flat is not None:
            pieces += [_squeeze(fixed), flat]
            fixed = []
    if fixed:
        pieces.append(_squeeze(fixed))
    if len(pieces) == 1:
        return pieces[0][0]
    slices = [_slices(data, np.cumsum(lengths) - lengths, lengths) for data, lengths in pieces]
    return b"".join([piece for row in zip(*slices, strict=True) for piece in row])


def _squeeze(fixed: Sequence[Fixed]) -> Flat:
    """Columns of bytes side by side, without those that do not count."""
    matrix = np.concatenate([content for content, _ in fixed], axis=1)
    counts = np.concatenate(
        [np.arange(content.shape[1]) < lengths[:, None] for content, lengths in fixed], axis=1
    )
    return matrix[counts].tobytes(), counts.sum(axis=1)


def _encode_column(column: pa.Array) -> tuple[Fixed, Flat | None]:
    """The sizes and numbers of a column, and what follows them in each row."""
    null = column.is_null().to_numpy(zero_copy_only=False)
    if column.type == pa.string():
        return _encode_strings(column.fill_null(""), null)
    if pa.types.is_list(column.type):
        return _encode_lists(column, null)
    if column.type not in _NUMBERS:
        sql_type(column.type)  # raises
    values = column
    if column.type == _TIMESTAMP:
        values = pc.subtract(column.cast(pa.int64()), _EPOCH_US)
    if column.type == pa.bool_():
        values = column.cast(pa.uint8())
    if null.any():
        values = values.fill_null(pa.scalar(0, values.type))
    numbers = values.to_numpy(zero_copy_only=False).astype(_NUMBERS[column.type])
    sizes = np.where(null, -1, numbers.dtype.itemsize)
    content = np.concatenate([_big_endian(sizes), numbers.reshape(-1, 1).view(np.uint8)], axis=1)
    return (content, 4 + np.maximum(sizes, 0)), None


def _big_endian(values: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Int32 [R] or [R, C] as bytes: uint8 [R, 4 C]."""
    return values.astype(">i4").reshape(len(values), -1).view(np.uint8)


def _encode_strings(column: pa.Array, null: NDArray[np.bool_]) -> tuple[Fixed, Flat]:
    _, offset_buffer, data = column.buffers()
    offsets = np.frombuffer(offset_buffer, dtype=np.int32)
    offsets = offsets[column.offset : column.offset + len(column) + 1].astype(np.int64)
    lengths = np.diff(offsets)
    flat = bytes(memoryview(data)[offsets[0] : offsets[-1]]) if data is not None else b""
    sizes = _big_endian(np.where(null, -1, lengths))
    return (sizes, np.full(len(column), 4)), (flat, lengths)


def _encode_lists(column: pa.Array, null: NDArray[np.bool_]) -> tuple[Fixed, Flat]:
    values = column.flatten()  # of the rows that are not null
    if values.null_count:
        raise StoreError(
            "a list holds a null, which the online store would turn into 0: leave it out instead"
        )
    if values.type not in _ELEMENT_OIDS:
        sql_type(column.type)  # raises
    lengths = pc.list_value_length(column).fill_null(0).to_numpy().astype(np.int64)
    elements = np.empty(len(values), dtype=[("size", ">i4"), ("value", _NUMBERS[values.type])])
    elements["size"] = elements.dtype["value"].itemsize
    elements["value"] = values.to_numpy()
    some = lengths > 0
    bytes_of_list = lengths * elements.dtype.itemsize
    header = np.zeros((len(column), 6), dtype=np.int64)
    header[:, 0] = np.where(null, -1, np.where(some, 20 + bytes_of_list, 12))
    header[:, 1] = some
    header[:, 3] = _ELEMENT_OIDS[values.type]
    header[:, 4] = lengths
    header[:, 5] = 1
    used = np.where(null, 4, np.where(some, 24, 16))
    return (_big_endian(header), used), (elements.tobytes(), bytes_of_list)


def _read(buffer: NDArray[np.uint8], place: NDArray[np.int64], dtype: str) -> NDArray[np.generic]:
    """Read a number at each place."""
    size = np.dtype(dtype).itemsize
    found: NDArray[np.generic] = buffer[place[:, None] + np.arange(size)].view(dtype).reshape(-1)
    return found


def _decode_column(
    data: bytes,
    buffer: NDArray[np.uint8],
    place: NDArray[np.int64],
    sizes: NDArray[np.int64],
    arrow: pa.DataType,
) -> pa.Array:
    null = sizes < 0
    if arrow == pa.string():
        offsets = _offsets(np.maximum(sizes, 0))
        text = pa.py_buffer(b"".join(_pieces(data, place, np.maximum(sizes, 0))))
        valid = pa.array(~null).buffers()[1]
        return pa.Array.from_buffers(pa.string(), len(sizes), [valid, pa.py_buffer(offsets), text])
    if pa.types.is_list(arrow):
        dtype = np.dtype([("size", ">i4"), ("value", _NUMBERS[arrow.value_type])])
        lengths = np.maximum(sizes - 20, 0) // dtype.itemsize
        cells = _pieces(data, place + 20, lengths * dtype.itemsize)
        elements = np.frombuffer(b"".join(cells), dtype=dtype)
        assert (elements["size"] == dtype["value"].itemsize).all(), "a list holds a null"
        values = elements["value"].astype(dtype["value"].newbyteorder("="))
        return pa.ListArray.from_arrays(
            pa.array(_offsets(lengths)), pa.array(values), type=arrow, mask=pa.array(null)
        )
    numbers = _read(buffer, place, _NUMBERS[arrow])
    numbers = numbers.astype(numbers.dtype.newbyteorder("="))
    if arrow == _TIMESTAMP:
        return pa.array(numbers + _EPOCH_US, mask=null).cast(_TIMESTAMP)
    return pa.array(numbers, mask=null).cast(arrow)


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _slices(data: bytes, place: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[memoryview]:
    """The bytes of each cell."""
    view = memoryview(data)
    ends = (place + lengths).tolist()
    return [view[start:end] for start, end in zip(place.tolist(), ends, strict=True)]


def _pieces(data: bytes, place: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[bytes]:
    """The same as copies: Python's collector looks through many thousand views again and again."""
    ends = (place + lengths).tolist()
    return [data[start:end] for start, end in zip(place.tolist(), ends, strict=True)]
