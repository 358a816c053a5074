"""Appending domain tokens to a byte-level BPE tokenizer that exists.

A tokenizer applies its merges in their order. What is appended comes after all that was there and
joins only what the old merges leave, so no input ever gets longer and every input decodes as
before: proved by the order, and tested on random Unicode and real text.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel

from encoders.lm.tokenizer_config import ExtendConfig
from feature_repo.errors import EncoderError

Pair = tuple[str, str]

_NUM_WALKS = 4
"""At most; the second leaves out nearly all that the first brought in vain."""
_FIRST_VOCABULARY = 4
"""The domain's own tokenizer learns so many times the tokens that are wanted: many of its tokens
exist already, or take more than two of the old ones."""


@dataclass(frozen=True)
class Appended:
    """A new token.

    Args:
        token: In the byte-level alphabet.
        token_id: Above all ids before.
        pieces: Ids of the old tokens that wrote it, at least 2.
    """

    token: str
    token_id: int
    pieces: tuple[int, ...]


@dataclass(frozen=True)
class Extension:
    """An extended tokenizer.

    Args:
        content: Of its ``tokenizer.json``.
        appended: In the order of their ids.
    """

    content: dict[str, Any]
    appended: list[Appended]

    @property
    def tokenizer(self) -> Tokenizer:
        """Ready to use."""
        return Tokenizer.from_str(json.dumps(self.content))


def append_tokens(
    content: Mapping[str, Any], texts: Iterable[str], config: ExtendConfig
) -> Extension:
    """Find tokens worth appending, and append them.

    An own tokenizer is trained on the domain's text, cut as the base cuts. Its vocabulary is walked
    by frequency, which is the order of its merges; left out is what the base has, and what its
    pre-tokenizer would cut. Where the tokenizer so far writes a candidate with exactly two tokens,
    their merge and a new id are appended. The walk is repeated, for a candidate may have become two
    tokens since, until nothing is added. Tokens that are seldom used where their strings are, are
    left out, and everything is walked once more.

    Args:
        content: Of the base's ``tokenizer.json``.
        texts: Of the domain.
        config: How many.

    Raises:
        EncoderError: If the base is no byte-level BPE.

    Source:
        "Vocabulary Customization for Efficient Domain-Specific LLM Deployment", 2025,
        arXiv:2509.26124. The repeated walk and the rule of use are ours.
    """
    check_byte_level(content)
    base = Tokenizer.from_str(json.dumps(content))
    pieces = _pieces(base, texts)
    known = base.get_vocab(with_added_tokens=True)
    candidates = {
        token: [piece.value for piece in base.model.tokenize(token)]
        for token in _candidates(base, pieces, config)
        if token not in known
    }
    for _ in range(_NUM_WALKS):
        merges = _walk(candidates, config.num_tokens)
        unused = _seldom_used(base, merges, pieces, config.min_use)
        if not unused:
            break
        candidates = {token: old for token, old in candidates.items() if token not in unused}
    next_id = max(known.values()) + 1
    appended = [
        Appended(
            first + second, next_id + place, tuple(known[old] for old in candidates[first + second])
        )
        for place, (first, second) in enumerate(merges)
    ]
    return Extension(_with_merges(content, merges, appended), appended)


def _walk(candidates: Mapping[str, Sequence[str]], num_tokens: int) -> list[Pair]:
    """Merges in the order in which they are appended."""
    ranks: dict[Pair, int] = {}
    left = {token: list(old) for token, old in candidates.items()}
    num_before = -1
    while num_before < len(ranks) < num_tokens:
        num_before = len(ranks)
        for token in list(left):
            left[token] = _apply(ranks, left[token])
            if len(left[token]) == 2 and len(ranks) < num_tokens:
                first, second = left.pop(token)
                ranks[first, second] = len(ranks)
    return list(ranks)


def _seldom_used(
    base: Tokenizer, merges: Sequence[Pair], pieces: Mapping[str, int], min_use: float
) -> set[str]:
    """Appended tokens that pieces seldom use that hold their strings.

    Most were steps of the domain's own tokenizer on its way to a longer token, to which the base
    comes by other steps. A step to an appended token that is used counts as used.
    """
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    steps: dict[str, set[str]] = {}
    for first, second in merges:
        steps[first + second] = (
            {first + second} | steps.get(first, set()) | steps.get(second, set())
        )
    longest = max(map(len, steps), default=0)
    held: Counter[str] = Counter()
    used: Counter[str] = Counter()
    for piece, count in pieces.items():
        inside = {
            piece[start:stop]
            for start in range(len(piece))
            for stop in range(start + 2, min(start + longest, len(piece)) + 1)
        }
        tokens = _apply(ranks, [token.value for token in base.model.tokenize(piece)])
        taken = {step for token in tokens for step in steps.get(token, ())}
        for name in inside & steps.keys():
            held[name] += count
            used[name] += count * (name in taken)
    return {name for name in steps if used[name] < min_use * held[name]}


def _with_merges(
    content: Mapping[str, Any], merges: Sequence[Pair], appended: Sequence[Appended]
) -> dict[str, Any]:
    extended: dict[str, Any] = json.loads(json.dumps(content))
    if not merges:
        return extended
    model = extended["model"]
    # Where the model does not have an added token, the library numbers it after the model's last.
    model["vocab"] |= {token["content"]: token["id"] for token in extended["added_tokens"]}
    is_text = bool(model["merges"]) and isinstance(model["merges"][0], str)  # in older files
    model["merges"] += [" ".join(pair) if is_text else list(pair) for pair in merges]
    model["vocab"] |= {token.token: token.token_id for token in appended}
    return extended


def _pieces(base: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """How often the text between the base's cuts is what, in the byte-level alphabet."""
    distinct = Counter(texts)
    pieces: Counter[str] = Counter()
    for text, count in distinct.items():
        if base.normalizer is not None:
            text = base.normalizer.normalize_str(text)
        for piece, _ in base.pre_tokenizer.pre_tokenize_str(text):
            pieces[piece] += count
    return pieces


def check_byte_level(content: Mapping[str, Any]) -> None:
    """Make sure that a tokenizer is what tokens can be appended to.

    Raises:
        EncoderError: If it is no byte-level BPE.
    """
    kind = content.get("model", {}).get("type")
    is_byte_level = "ByteLevel" in _types(content.get("pre_tokenizer"))
    if kind != "BPE" or not is_byte_level or content["model"].get("byte_fallback"):
        what = f"a {kind} model" if kind != "BPE" else "a BPE model that is not byte-level"
        raise EncoderError(
            f"the tokenizer is {what}: tokens can only be appended to a byte-level BPE, as GPT-2, "
            "Llama 3, Qwen and `longtrail lm tokenizer` have it; choose such a base"
        )


def _types(part: Any) -> Iterator[str]:
    """Types of a pre-tokenizer and of what it is made of."""
    if isinstance(part, dict):
        yield str(part.get("type"))
        for inner in part.get("pretokenizers", ()):
            yield from _types(inner)


def _candidates(base: Tokenizer, pieces: Mapping[str, int], config: ExtendConfig) -> Iterator[str]:
    """Tokens of the domain's own tokenizer, the most frequent first, that the base does not cut."""
    own = Tokenizer(models.BPE())  # without pre-tokenizer: pieces are cut already
    trainer = trainers.BpeTrainer(
        vocab_size=_FIRST_VOCABULARY * config.num_tokens + len(ByteLevel.alphabet()),
        min_frequency=config.min_frequency,
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    stream = (piece for piece, count in pieces.items() for _ in range(count))
    own.train_from_iterator(stream, trainer)
    for token, _ in sorted(own.get_vocab().items(), key=lambda entry: entry[1]):
        text = token_text(token)
        # Half a character has no text of its own: it was learned inside a piece, so it is in one.
        if len(token) > 1 and (text is None or len(base.pre_tokenizer.pre_tokenize_str(text)) == 1):
            yield token


def token_text(token: str) -> str | None:
    """The text of a token in the byte-level alphabet; None where it is no whole characters."""
    try:
        return bytes(_BYTES[character] for character in token).decode()
    except (KeyError, UnicodeDecodeError):
        return None


def _byte_alphabet() -> dict[str, int]:
    """Printable character -> byte, as GPT-2 chose them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


_BYTES = _byte_alphabet()


def _apply(ranks: Mapping[Pair, int], tokens: Sequence[str]) -> list[str]:
    """The tokens after all appended merges, the lowest rank first."""
    tokens = list(tokens)
    while True:
        ranked = [
            (ranks[pair], place) for place, pair in enumerate(pairwise(tokens)) if pair in ranks
        ]
        if not ranked:
            return tokens
        _, place = min(ranked)
        tokens[place : place + 2] = [tokens[place] + tokens[place + 1]]
