"""The bytes that Feast 0.67 keeps in Redis, made from arrow columns and read back into numpy.

Feast makes a protobuf object per value; here a whole column is encoded at once. A test compares
every byte with what Feast writes.

A ``Value`` message sets one field: a tag, then a number (varint or fixed width), or the length and
the bytes of a string or of an inner list message, whose only field is packed. A null is no bytes at
all. An entity key is the number of its keys, then type, length and text of each key's name, then
type, length and bytes of each value; the project's name follows.
"""

import struct
from collections.abc import Sequence
from functools import cache
from itertools import chain, compress, pairwise
from typing import Any

import mmh3
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from feast.protos.feast.types.Value_pb2 import Value, ValueType
from feast.types import Array, Float32, Float64, Int64, String
from numpy.typing import NDArray

from feature_repo.columns import Column, Ragged, column_from_values
from feature_repo.errors import StoreError

VALUE_FIELDS = {
    Int64: "int64_val",
    Float32: "float_val",
    Float64: "double_val",
    String: "string_val",
    Array(Int64): "int64_list_val",
    Array(Float32): "float_list_val",
}
"""Feast type -> the field of a ``Value`` that holds it; features have these types only."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types of protobuf, the low three bits of a tag."""
_WIRE_TYPES = {"int64_val": _VARINT, "float_val": _FIXED32, "double_val": _FIXED64}
_PACKED = b"\x0a"
"""Tag of field 1 of a list message, its packed numbers."""
_BLOCK = 16_384
"""Numbers whose varints are made at once: the steps in between stay in the processor's cache."""


def feature_field(view: str, feature: str) -> bytes:
    """Name of a feature's field in the hash of an entity: murmur3 of its name, little endian."""
    return struct.pack("<I", mmh3.hash(f"{view}:{feature}", signed=False))


def time_field(view: str) -> bytes:
    """Name of the field with the event time of a view's features."""
    return f"_ts:{view}".encode()


def project_of(key: bytes) -> bytes | None:
    """The project at the end of a Redis key of one join key; None where it is no such key."""
    try:
        count, kind, size = struct.unpack_from("<III", key)
        value_kind, value_size = struct.unpack_from("<II", key, 12 + size)
    except struct.error:
        return None
    end = 20 + size + value_size
    kinds = (ValueType.STRING, ValueType.INT64)
    if count != 1 or kind != ValueType.STRING or value_kind not in kinds or end > len(key):
        return None
    return key[end:]


class KeyCodec:
    """Redis keys of the entities of one join key.

    Args:
        join_key: Its name.
        project: Feast's project.
        is_string: Whether its values are strings; else they are 64-bit integers.
    """

    def __init__(self, join_key: str, project: str, *, is_string: bool) -> None:
        name = join_key.encode()
        self.is_string = is_string
        kind = ValueType.STRING if is_string else ValueType.INT64
        #: What the keys of all entities of this join key begin with.
        self.prefix = struct.pack("<III", 1, ValueType.STRING, len(name)) + name
        self.prefix += struct.pack("<I", kind)
        self.suffix = project.encode()

    def encode(self, values: Sequence[str] | Sequence[int]) -> list[bytes]:
        """The Redis key of each value."""
        prefix, suffix = self.prefix, self.suffix
        if self.is_string:
            texts = [str(value).encode() for value in values]
            return [prefix + len(t).to_bytes(4, "little") + t + suffix for t in texts]
        pack = struct.Struct("<Iq").pack
        return [prefix + pack(8, value) + suffix for value in values]

    def owns(self, key: bytes) -> bool:
        """Whether a Redis key is one of these: its length must be what it says."""
        place = len(self.prefix)
        size = int.from_bytes(key[place : place + 4], "little")
        whole = place + 4 + size + len(self.suffix)
        return len(key) == whole and key.startswith(self.prefix) and key.endswith(self.suffix)

    def decode(self, keys: Sequence[bytes]) -> pa.Array:
        """The values of Redis keys."""
        start, end = len(self.prefix) + 4, -len(self.suffix) or None
        values = [key[start:end] for key in keys]
        if self.is_string:
            return pa.array([value.decode() for value in values], pa.string())
        return pa.array(np.frombuffer(b"".join(values), "<i8"))


def varints(numbers: NDArray[np.uint64]) -> tuple[bytes, NDArray[np.int64]]:
    """Varints of N numbers, end to end, and the N + 1 places where they begin and end."""
    blocks = [_varint_block(numbers[i : i + _BLOCK]) for i in range(0, len(numbers), _BLOCK)]
    ends = np.zeros(len(numbers) + 1, dtype=np.int64)
    if blocks:
        np.cumsum(np.concatenate([lengths for _, lengths in blocks]), out=ends[1:])
    return b"".join(data for data, _ in blocks), ends


def _varint_block(numbers: NDArray[np.uint64]) -> tuple[bytes, NDArray[np.uint8]]:
    """Varints, seven bits a byte and low ones first, and their lengths in bytes, 1 to 10."""
    lengths = np.ones(len(numbers), dtype=np.uint8)
    for limit in _LENGTH_LIMITS:
        lengths += numbers >= limit
    # The low 56 bits become 8 bytes of 7 bits: halves, quarters, eighths are moved apart.
    low = numbers & np.uint64((1 << 56) - 1)
    for kept, moved, shift in _SPREAD:
        low = (low & kept) | ((low & moved) << shift)
    high = numbers >> np.uint64(56)
    words = np.empty((len(numbers), 2), dtype=np.uint64)
    words[:, 0] = low | _CONTINUED[lengths]
    # The ninth byte has 7 bits, the tenth the 64th.
    words[:, 1] = (high & np.uint64(0x7F)) | ((high >> np.uint64(7)) * np.uint64(0x180))
    width = int(lengths.max())
    data = np.ascontiguousarray(words.astype("<u8", copy=False).view(np.uint8)[:, :width])
    short = np.flatnonzero(lengths < width)
    if not len(short):
        return data.tobytes(), lengths
    surplus = width - lengths[short].astype(np.int64)
    ends = np.repeat((short + 1) * width, surplus)
    back = np.arange(len(ends)) - np.repeat(np.cumsum(surplus) - surplus, surplus) + 1
    keep = np.ones(data.size, dtype=bool)
    keep[ends - back] = False
    return data.reshape(-1)[keep].tobytes(), lengths


_LENGTH_LIMITS = [np.uint64(1 << 7 * count) for count in range(1, 10)]
_SPREAD = [
    (np.uint64(kept), np.uint64(moved), np.uint64(shift))
    for kept, moved, shift in (
        (0x000000000FFFFFFF, 0x00FFFFFFF0000000, 4),
        (0x00003FFF00003FFF, 0x0FFFC0000FFFC000, 2),
        (0x007F007F007F007F, 0x3F803F803F803F80, 1),
    )
]
_CONTINUED = np.array(
    [sum(0x80 << 8 * place for place in range(min(length - 1, 8))) for length in range(11)],
    dtype=np.uint64,
)
"""Length -> the bit "more follows" of all its bytes but the last, of the first eight."""


def time_bytes(times: NDArray[np.int64]) -> list[bytes]:
    """``Timestamp`` messages of epoch microseconds: seconds, nanoseconds, zeros left out."""
    seconds, micros = np.divmod(times, 1_000_000)
    numbers = np.stack([seconds, micros * 1000], axis=1).reshape(-1).view(np.uint64)
    data, ends = varints(numbers)
    pieces = [data[start:end] for start, end in pairwise(ends.tolist())]
    return [
        (b"\x08" + second if second != b"\0" else b"") + (b"\x10" + nano if nano != b"\0" else b"")
        for second, nano in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def times_from_bytes(values: Sequence[bytes | None]) -> NDArray[np.int64]:
    """Epoch microseconds of ``Timestamp`` messages; 0 where there is none."""
    return np.array([_micros(value) if value else 0 for value in values], dtype=np.int64)


def _micros(message: bytes) -> int:
    parts = {8: 0, 16: 0}
    place = 0
    while place < len(message):
        tag, number, shift = message[place], 0, 0
        place += 1
        while True:
            byte = message[place]
            place += 1
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        parts[tag] = number - (1 << 64) if number >> 63 else number
    return parts[8] * 1_000_000 + parts[16] // 1000


def value_bytes(column: pa.Array, field: str) -> list[bytes]:
    """``Value`` messages of a column; nulls are empty, as Feast writes them.

    Args:
        column: R values.
        field: Which field of ``Value`` they set, see :data:`VALUE_FIELDS`.

    Raises:
        StoreError: If a list holds a null: online it would come back as 0.
    """
    tag = _tag(field)
    if field.endswith("list_val"):
        messages = _list_bytes(column, tag, is_float=field == "float_list_val")
    elif field == "string_val":
        texts = [text.encode() for text in pc.fill_null(column, "").to_pylist()]
        messages = [tag + _varint(len(text)) + text for text in texts]
    elif field == "int64_val":
        numbers = np.asarray(pc.fill_null(column.cast(pa.int64()), 0))
        data, ends = varints(numbers.view(np.uint64))
        messages = [tag + data[start:end] for start, end in pairwise(ends.tolist())]
    else:
        wanted, width = ("<f4", 4) if field == "float_val" else ("<f8", 8)
        values = column.to_numpy(zero_copy_only=False).astype(wanted)
        data = values.tobytes()
        messages = [tag + data[i : i + width] for i in range(0, len(data), width)]
        for row in np.flatnonzero(np.isnan(values)):  # what was null, and what Feast takes for it
            messages[row] = b""
    if column.null_count:
        for row in np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)):
            messages[row] = b""
    return messages


def _list_bytes(column: pa.Array, tag: bytes, *, is_float: bool) -> list[bytes]:
    offsets = column.offsets.to_numpy().astype(np.int64)
    numbers = column.values.slice(offsets[0], offsets[-1] - offsets[0])
    if numbers.null_count:
        raise StoreError("a list feature holds a null: feature files must not have null elements")
    offsets = offsets - offsets[0]
    if is_float:
        data = numbers.to_numpy().astype("<f4", copy=False).tobytes()
        places = (offsets * 4).tolist()
    else:
        data, ends = varints(numbers.cast(pa.int64()).to_numpy().view(np.uint64))
        places = ends[offsets].tolist()
    heads: dict[int, bytes] = {}
    messages = []
    for start, end in pairwise(places):
        size = end - start
        head = heads.get(size)
        if head is None:
            inner = _PACKED + _varint(size) if size else b""
            head = heads[size] = tag + _varint(len(inner) + size) + inner
        messages.append(head + data[start:end])
    return messages


@cache
def _tag(field: str) -> bytes:
    """What a ``Value`` that sets a field begins with."""
    number = Value.DESCRIPTOR.fields_by_name[field].number
    return _varint(number << 3 | _WIRE_TYPES.get(field, _BYTES))


def _varint(number: int) -> bytes:
    """One varint: a tag or a length."""
    pieces = bytearray()
    while number > 0x7F:
        pieces.append(number & 0x7F | 0x80)
        number >>= 7
    pieces.append(number)
    return bytes(pieces)


def column_from_bytes(
    messages: Sequence[bytes | None], valid: NDArray[np.bool_], field: str
) -> Column:
    """A column of ``Value`` messages, as :func:`feature_repo.columns.column_from_values` makes it.

    A value of another type, written before the feature's type changed, is missing.

    Args:
        messages: R messages; None or empty where there is no value.
        valid: bool [R]; False where the row is missing or expired.
        field: Which field of ``Value`` they set.
    """
    tag = _tag(field)
    filled = [
        message is not None and bool(ok) and message.startswith(tag)
        for message, ok in zip(messages, valid, strict=True)
    ]
    chosen = [message for message in compress(messages, filled) if message is not None]
    if field.endswith("list_val"):
        if field == "float_list_val":
            sizes = list(map(_packed_size, chosen))
            data = b"".join(m[len(m) - s :] for m, s in zip(chosen, sizes, strict=True))
            flat = np.frombuffer(data, "<f4").astype(np.float32, copy=False)
            counts = [size // 4 for size in sizes]
        else:
            lists = [Value.FromString(message).int64_list_val.val for message in chosen]
            counts = list(map(len, lists))
            flat = np.array(lists[0] if len(lists) == 1 else list(chain(*lists)), dtype=np.int64)
        lengths = np.zeros(len(messages), dtype=np.int64)
        lengths[filled] = counts
        return Ragged(flat, lengths)
    if field in ("float_val", "double_val"):
        dtype, width = (np.float32, 4) if field == "float_val" else (np.float64, 8)
        numbers = np.full(len(messages), np.nan, dtype=dtype)
        packed = b"".join(message[-width:] for message in chosen)
        numbers[filled] = np.frombuffer(packed, f"<f{width}")
        return numbers
    values: list[Any] = [Value.FromString(message or b"") for message in messages]
    return column_from_values(values, valid, field)


def _packed_size(message: bytes) -> int:
    """Bytes of the packed numbers of a list message: what is behind tag, length, tag, length."""
    place = _behind(message, _behind(message, 0))
    if place == len(message):  # an empty list
        return 0
    return len(message) - _behind(message, _behind(message, place))


def _behind(message: bytes, place: int) -> int:
    """Where the varint at a place ends."""
    while message[place] > 0x7F:
        place += 1
    return place + 1
