"""A behaviour is its normalised text; its id is a hash of that text.

Any worker computes the id without a dictionary. Ids use 63 of the 64 bits: they stay non-negative,
so 0 is free to mean "none" and a protobuf varint takes 9 bytes instead of 10.
"""

import re
import unicodedata
from collections.abc import Iterable

import numpy as np
import xxhash
from numpy.typing import NDArray

_SPACES = re.compile(r"\s+")
_MASK = (1 << 63) - 1


def normalize(text: str, *, lowercase: bool) -> str:
    """Unicode NFKC, runs of white space as one space, no white space at the ends."""
    text = _SPACES.sub(" ", unicodedata.normalize("NFKC", text)).strip()
    return text.lower() if lowercase else text


def hash63(value: str) -> int:
    """Hash of ``value`` in ``[1, 2**63)``: xxh3, 64 bits, the top bit dropped, 0 mapped to 1."""
    return hash63_bytes(value.encode("utf-8"))


def hash63_bytes(value: bytes) -> int:
    """:func:`hash63` of bytes."""
    return (xxhash.xxh3_64_intdigest(value) & _MASK) or 1


def behavior_id(text: str) -> int:
    """Id of a behaviour text that is already normalised."""
    return hash63(text)


def item_key(item_id: str | None) -> int:
    """Id under which sequences hold an item; 0 where the event names none."""
    return 0 if item_id is None else hash63(item_id)


def hash63_array(values: Iterable[str]) -> NDArray[np.int64]:
    """:func:`hash63` of every value."""
    return np.fromiter((hash63(value) for value in values), dtype=np.int64)
