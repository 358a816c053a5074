"""The history as one text: token ids of every behaviour text, and how they are put in a row.

Shapes: B = contexts, N = behaviours of a context, P = tokens of a row, D = vector width, V = table
rows, K = known texts, T = tokens of the longest text.

A text is found by its vector: rows of the embedding table move when texts are added to it, vectors
do not, and nothing else that a program is given says what was read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from encoders.batches import TokenizedTexts
from encoders.pretrained import load_tokenizer
from feature_repo.errors import ArtifactError
from feature_repo.home import Home

KEY_WIDTH = 32
"""Numbers of a vector that its key is made from: two texts that share 32 floats share all."""
_KEY_SEED = 0x5EED
_NO_KEY = 2**63 - 1
_CHUNK_TEXTS = 10_000


@dataclass(frozen=True)
class BehaviorTokens:
    """The texts of a table as a language model reads them."""

    start: tuple[int, ...]
    """Token ids that the model expects before a text: one, or none."""
    texts: TokenizedTexts
    """V - 1 texts, each with a separator after it; length 0 where the text is not known."""


class TextTokens(nn.Module):
    """Token ids by vector; none are known until :meth:`set_tokens`.

    Args:
        width: D.
    """

    factors: Tensor
    start: Tensor
    keys: Tensor
    tokens: Tensor
    lengths: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(_KEY_SEED)
        factors = torch.randint(-(2**62), 2**62, (min(width, KEY_WIDTH),), generator=generator)
        self.register_buffer("factors", factors * 2 + 1)
        self.register_buffer("start", torch.zeros(0, dtype=torch.int64))
        # The last of the K + 1 rows is "no text".
        self.register_buffer("keys", torch.tensor([_NO_KEY]))  # int64 [K + 1], ascending
        self.register_buffer("tokens", torch.zeros(1, 1, dtype=torch.int32))  # [K + 1, T]
        self.register_buffer("lengths", torch.zeros(1, dtype=torch.int64))  # [K + 1]

    def set_tokens(self, vectors: NDArray[np.float32], behaviors: BehaviorTokens) -> None:
        """Take the tokens of a table's texts.

        Args:
            vectors: float32 [V, D]; row 0 = no text.
            behaviors: V - 1 texts; text i belongs to row i + 1.

        Raises:
            ArtifactError: If two texts of different tokens have one vector.
        """
        texts = behaviors.texts
        known = np.flatnonzero(texts.lengths)
        keys = self._keys_of(torch.from_numpy(np.array(vectors[known + 1]))).numpy()
        order = np.argsort(keys, kind="stable")
        known, keys = known[order], keys[order]
        lengths = np.append(texts.lengths[known], 0)
        columns = np.arange(max(1, int(lengths.max())))
        keep = columns < lengths[:, None]
        tokens = np.zeros(keep.shape, dtype=np.int32)
        starts = np.append(texts.starts[known], 0)
        tokens[keep] = texts.ids[(starts[:, None] + columns)[keep]]
        same_key = np.flatnonzero(keys[1:] == keys[:-1])
        if (tokens[same_key] != tokens[same_key + 1]).any():
            raise ArtifactError(
                "two texts of different tokens have the same vector, so that a vector does not "
                "tell its text: encode with a larger --max-tokens"
            )
        self.start = torch.tensor(behaviors.start, dtype=torch.int64)
        self.keys = torch.from_numpy(np.append(keys, _NO_KEY))
        self.tokens = torch.from_numpy(tokens)
        self.lengths = torch.from_numpy(lengths)

    def places(self, vectors: Float[Tensor, "*N D"]) -> Int[Tensor, "*N"]:
        """Find the rows of ``tokens`` and ``lengths``; an unknown text gets the last, of length 0.

        Args:
            vectors: Bit for bit those of the table.
        """
        keys = self._keys_of(vectors)
        places = torch.searchsorted(self.keys, keys)
        none = torch.full_like(places, len(self.keys) - 1)
        return torch.where(self.keys[places] == keys, places, none)

    def pack(
        self, places: Int[Tensor, "B N"], num_tokens: int
    ) -> tuple[Int[Tensor, "B P"], Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
        """Put texts in a row and keep its newest tokens, padded on the right.

        Where the row is longer than P, the oldest text that is left may begin in its middle.

        Args:
            places: Of :meth:`places`, the newest text last.
            num_tokens: P.

        Returns:
            Token ids, which of the N texts each is of, and True = keep, a token is there.
        """
        lengths = self.lengths[places]
        ends = lengths.cumsum(1)
        total = ends[:, -1:]
        skipped = (total - num_tokens).clamp(min=0)
        row = torch.arange(num_tokens, device=places.device) + skipped
        keep = row < total
        owners = torch.searchsorted(ends, row, right=True).clamp(max=places.shape[1] - 1)
        columns = row - (ends - lengths).gather(1, owners)
        columns = columns.clamp(0, self.tokens.shape[1] - 1)
        return self.tokens[places.gather(1, owners), columns].long(), owners, keep

    def _keys_of(self, vectors: Float[Tensor, "*N D"]) -> Int[Tensor, "*N"]:
        """Exact on every machine: integers that wrap around, from the numbers' bits."""
        bits = vectors[..., :KEY_WIDTH].contiguous().view(torch.int32).long()
        return (bits * self.factors).sum(-1)

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Take buffers of any size: how many texts there are is known only from the weights."""
        for name in ("start", "keys", "tokens", "lengths"):
            if prefix + name in state:
                setattr(self, name, torch.empty_like(state[prefix + name]))
        super()._load_from_state_dict(state, prefix, *rest)


def behavior_tokens(
    home: Home, ids: NDArray[np.int64], *, model: str, max_tokens: int
) -> BehaviorTokens:
    """Tokenise behaviour texts as they are: an encoder's prompt is left out.

    Args:
        home: The home folder, ingested.
        ids: int64 [V - 1]; behaviours, as the embedding table has them.
        model: Whose tokenizer; see :func:`encoders.pretrained.find_model_folder`.
        max_tokens: Tokens kept of a text, the separator included; at least 2.

    Returns:
        V - 1 texts; one that the home folder no longer holds has length 0.

    Raises:
        ArtifactError: If the tokenizer has no token that can separate texts.
        EncoderError: If the tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(model)
    separator = _first_id(tokenizer.sep_token_id, tokenizer.eos_token_id)
    if separator is None:
        raise ArtifactError(
            f"the tokenizer of model {model!r} has neither a sep nor an eos token, one of which "
            "must stand between the texts of a history"
        )
    start = _first_id(tokenizer.cls_token_id, tokenizer.bos_token_id)
    behaviors = pq.read_table(home.behaviors, columns=["behavior_id", "text"])
    text_of = dict(zip(behaviors[0].to_pylist(), behaviors[1].to_pylist(), strict=True))
    known = [(i, text_of[text_id]) for i, text_id in enumerate(ids.tolist()) if text_id in text_of]
    token_ids, lengths = [np.empty(0, dtype=np.int64)], np.zeros(len(ids), dtype=np.int64)
    for first in range(0, len(known), _CHUNK_TEXTS):
        chunk = known[first : first + _CHUNK_TEXTS]
        encoded = tokenizer(
            [text for _, text in chunk],
            add_special_tokens=False,
            truncation=True,
            max_length=max_tokens - 1,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        for (i, _), row in zip(chunk, encoded, strict=True):
            token_ids.append(np.asarray([*row, separator], dtype=np.int64))
            lengths[i] = len(row) + 1
    return BehaviorTokens(
        start=() if start is None else (start,),
        texts=TokenizedTexts(np.concatenate(token_ids), lengths),
    )


def _first_id(*ids: int | None) -> int | None:
    return next((i for i in ids if i is not None), None)
