"""Which texts were there before, exactly or nearly, in one pass over a stream."""

from collections.abc import Iterator

import xxhash
from datasketch import MinHash, MinHashLSH

from feature_repo.behavior import hash63

SHINGLE_CHARACTERS = 5
"""Texts are compared by the sets of their 5-character pieces: listings are a few words long, so
pieces of several words would make any two of them different."""
NUM_PERMUTATIONS = 64
"""Hash functions; the standard error of an estimated likeness of 0.8 is 0.05."""


class DuplicateFilter:
    """Remembers texts: about 150 bytes of memory per text, 2 KB where near copies count too.

    Args:
        near: Jaccard likeness of the sets of :data:`SHINGLE_CHARACTERS`-character pieces from which
            two texts count as one, in (0, 1); None finds exact copies only.

    Source:
        Broder, "On the resemblance and containment of documents", 1997, with locality-sensitive
        hashing: of a pair just at the threshold about half is found, of very alike pairs all are.
    """

    def __init__(self, near: float | None) -> None:
        self._seen: set[int] = set()
        self._near = None if near is None else MinHashLSH(threshold=near, num_perm=NUM_PERMUTATIONS)
        self._blank = MinHash(num_perm=NUM_PERMUTATIONS, hashfunc=xxhash.xxh32_intdigest)

    def problem(self, text: str) -> str | None:
        """``exact_duplicate`` or ``near_duplicate`` of a text before, else None; remembers it."""
        key = hash63(text)
        if key in self._seen:
            return "exact_duplicate"
        self._seen.add(key)
        if self._near is None:
            return None
        sketch = self._blank.copy()
        sketch.update_batch(list(shingles(text)))
        if self._near.query(sketch):
            return "near_duplicate"
        self._near.insert(key, sketch, check_duplication=False)
        return None


def shingles(text: str) -> Iterator[bytes]:
    """The distinct pieces that a text is compared by, case aside; the text itself if shorter."""
    text = text.lower()
    last = max(1, len(text) - SHINGLE_CHARACTERS + 1)
    pieces = {text[start : start + SHINGLE_CHARACTERS] for start in range(last)}
    return (piece.encode() for piece in sorted(pieces))
