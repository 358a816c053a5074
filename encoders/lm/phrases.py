"""Phrase tokens: byte-pair merges go on across the spaces between words.

The tokenizers library cannot continue from merges that exist, so this trainer is ours.

Shapes: S = distinct texts, L = tokens of a text.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise

from encoders.lm.pretokenizer import MAX_DIGITS
from feature_repo.progress import Progress, silent

Pair = tuple[str, str]


def learn_phrases(
    texts: Mapping[tuple[str, ...], int],
    vocabulary: Collection[str],
    *,
    num_merges: int,
    min_frequency: int,
    min_texts: int,
    progress: Progress = silent,
) -> list[Pair]:
    """Merges of neighbouring tokens, the most frequent pair first, as byte-pair encoding does.

    A pair is merged only if it is in ``min_texts`` distinct texts: what a single text says, however
    often it is repeated, is no phrase but that text, and its token would say nothing of another. A
    phrase has one way of being made: a pair whose text is a token already is left apart, so a later
    merge never gives an earlier one new work, and the encoder that applies merges by rank ends
    where this trainer ends. No phrase has more than :data:`MAX_DIGITS` digits.

    Counts are updated around the places that a merge changes, so it costs time in proportion to
    these and to the length of the texts that hold the pair; memory O(S L).

    Args:
        texts: The tokens of each distinct text between two cuts -> how often it was seen. Tokens
            are in the byte-level alphabet.
        vocabulary: All tokens before.
        num_merges: Stop after so many; earlier where no pair is left.
        min_frequency: How often a pair must have been seen.
        min_texts: In how many distinct texts, at least 1.
        progress: Told merges.

    Returns:
        The pairs in order; ties go to the alphabetically first.

    Source:
        Liu et al., "SuperBPE", 2025, arXiv:2503.13423. There all text is one stream; here texts
        are fields and lines, and the rule of distinct texts is ours.
    """
    rows = [list(tokens) for tokens in texts]
    weights = list(texts.values())
    known = set(vocabulary)
    frequency: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)  # rows that held a pair once
    for row, tokens in enumerate(rows):
        for pair in pairwise(tokens):
            frequency[pair] += weights[row]
            places[pair].add(row)
    heap = [(-count, pair) for pair, count in frequency.items()]
    heapify(heap)
    merges: list[Pair] = []
    while heap and len(merges) < num_merges:
        count, pair = heappop(heap)
        if frequency[pair] != -count:  # an old entry: a newer one is in the heap
            continue
        if -count < min_frequency:
            break
        joined = pair[0] + pair[1]
        found = {row: _starts(rows[row], pair) for row in places.pop(pair)}
        found = {row: starts for row, starts in found.items() if starts}
        # Refused once is refused for good: of tokens that exist, no pair becomes more frequent.
        del frequency[pair]
        if len(found) < min_texts or not _allowed(joined) or joined in known:
            continue
        merges.append(pair)
        known.add(joined)
        changed: set[Pair] = set()
        for row, starts in found.items():
            tokens, weight = rows[row], weights[row]
            for lost in _around(tokens, starts, width=2):
                if lost in frequency:
                    frequency[lost] -= weight
                    changed.add(lost)
            for start in reversed(starts):
                tokens[start : start + 2] = [joined]
            now = [start - num_before for num_before, start in enumerate(starts)]
            for gained in _around(tokens, now, width=1):
                frequency[gained] += weight
                places[gained].add(row)
                changed.add(gained)
        for other in changed:
            if frequency[other]:
                heappush(heap, (-frequency[other], other))
        progress(1, num_merges)
    return merges


def _starts(tokens: list[str], pair: Pair) -> list[int]:
    """Where a pair stands, from the left and without overlap."""
    first, second = pair
    starts = []
    place = -1
    try:
        while True:
            place = tokens.index(first, place + 1)
            if tokens[place + 1 : place + 2] == [second]:
                starts.append(place)
                place += 1
    except ValueError:
        return starts


def _around(tokens: Sequence[str], starts: Sequence[int], *, width: int) -> list[Pair]:
    """The pairs that hold one of the tokens in ``[start, start + width)``, each place once."""
    lefts = {
        left
        for start in starts
        for left in range(max(start - 1, 0), min(start + width, len(tokens) - 1))
    }
    return [(tokens[left], tokens[left + 1]) for left in lefts]


def _allowed(token: str) -> bool:
    # Of other scripts' digits only bytes are seen here.
    return sum(character in "0123456789" for character in token) <= MAX_DIGITS
