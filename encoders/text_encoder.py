"""Texts through the shallow half of a language model, pooled into one vector each.

Shapes: n = texts, B = texts of a batch, T = tokens, D = width.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from encoders.batches import TokenizedTexts, plan_batches
from encoders.config import EncoderConfig, Pooling
from encoders.fingerprint import model_fingerprint
from encoders.pretrained import find_model_folder, load_tokenizer
from encoders.split import ShallowHalf, load_shallow_half
from feature_repo.errors import EncoderError
from feature_repo.manifest import EncoderManifest

_SHOWN_CHARACTERS = 80
"""Of a text that an error names."""


def pool(
    states: Float[Tensor, "B T D"], mask: Int[Tensor, "B T"] | None, pooling: Pooling
) -> Float[Tensor, "B D"]:
    """Turn token states into one vector per text, float32.

    Args:
        states: Token states of any precision.
        mask: 1 = keep, padding on the right; None = every token is kept.
        pooling: ``mean`` of the kept tokens, the ``last`` kept token, or the ``first``.
    """
    if pooling == "first":
        return states[:, 0].float()
    if mask is None:
        return states[:, -1].float() if pooling == "last" else states.float().mean(dim=1)
    num_kept = mask.sum(dim=1)
    if pooling == "last":
        return states[torch.arange(len(states)), num_kept - 1].float()
    # where, not a product: padding may hold infinite numbers.
    kept = torch.where(mask[:, :, None] != 0, states.float(), 0.0)
    return kept.sum(dim=1) / num_kept[:, None]


class TextEncoder:
    """A loaded shallow half with its tokenizer; :meth:`load` makes one.

    Args:
        half: The shallow half.
        tokenizer: The model's transformers tokenizer.
        manifest: How to pool, and the fingerprint of the vectors.
        batch_tokens: Tokens computed at once.
    """

    def __init__(
        self, half: ShallowHalf, tokenizer: Any, manifest: EncoderManifest, *, batch_tokens: int
    ) -> None:
        self.half = half
        self.manifest = manifest
        self._tokenizer = tokenizer
        self._batch_tokens = batch_tokens
        self._padding_id = tokenizer.pad_token_id or 0

    @classmethod
    def load(
        cls, manifest: EncoderManifest, *, batch_tokens: int = EncoderConfig.batch_tokens
    ) -> Self:
        """Load the encoder that a manifest describes.

        Raises:
            EncoderError: If the model cannot be found, loaded or split, is not the one that the
                manifest was made for, or takes fewer tokens than the manifest asks for.
        """
        found = model_fingerprint(find_model_folder(manifest.model))
        if found != manifest.model_fingerprint:
            raise EncoderError(
                f"model {manifest.model!r} has changed since its vectors were made (files "
                f"{found[:8]} here, {manifest.model_fingerprint[:8]} then): bring the former files "
                "back, or run `longtrail encode` for a new version of the vectors"
            )
        half = load_shallow_half(
            manifest.model, manifest.split_layer, dtype=getattr(torch, manifest.dtype)
        )
        tokenizer = load_tokenizer(manifest.model)
        limits = (half.model.config, "max_position_embeddings"), (tokenizer, "model_max_length")
        limit = min(getattr(holder, name, None) or manifest.max_tokens for holder, name in limits)
        if manifest.max_tokens > limit:
            raise EncoderError(
                f"max_tokens must be at most {limit} (what model {manifest.model!r} takes), got "
                f"{manifest.max_tokens}"
            )
        return cls(half, tokenizer, manifest, batch_tokens=batch_tokens)

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encode texts.

        Returns:
            float32 [n, D]; row i belongs to text i, whatever the other texts are.

        Raises:
            EncoderError: If a text has no tokens or no finite vector.
        """
        vectors = self.encode_tokens(self.tokenize([texts]), np.arange(len(texts)))
        check_finite(vectors, lambda row: texts[row])
        return vectors

    def tokenize(self, chunks: Iterable[Sequence[str]]) -> TokenizedTexts:
        """Put texts into the prompt and tokenise them, chunk by chunk.

        Raises:
            EncoderError: If the tokenizer finds no token in a text.
        """
        ids = [np.empty(0, dtype=np.int64)]
        lengths = [np.empty(0, dtype=np.int64)]
        before, after = self.manifest.prompt.split("{text}")
        for texts in chunks:
            if not texts:
                continue
            encoded: list[list[int]] = self._tokenizer(
                [before + text + after for text in texts],
                truncation=True,
                max_length=self.manifest.max_tokens,
                padding=False,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
            lengths.append(np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded)))
            if not lengths[-1].all():
                empty = texts[int(np.argmin(lengths[-1]))]
                raise EncoderError(f"the tokenizer finds no token in the text {_shown(empty)}")
            ids.append(np.concatenate([np.asarray(row, dtype=np.int64) for row in encoded]))
        return TokenizedTexts(np.concatenate(ids), np.concatenate(lengths))

    @torch.inference_mode()
    def encode_tokens(
        self,
        tokens: TokenizedTexts,
        rows: NDArray[np.int64],
        on_batch: Callable[[int], None] = lambda _: None,
    ) -> NDArray[np.float32]:
        """Encode some of the tokenised texts, shortest first.

        Args:
            tokens: All texts.
            rows: int64 [n]; which of them.
            on_batch: Called after each batch with its number of texts.

        Returns:
            float32 [n, D], in the order of ``rows``; not checked for finite numbers.
        """
        vectors = np.empty((len(rows), self.manifest.width), dtype=np.float32)
        order = np.argsort(tokens.lengths[rows], kind="stable")
        for batch in plan_batches(tokens.lengths[rows][order], self._batch_tokens):
            places = order[batch]
            block, keep = tokens.block(rows[places], padding_id=self._padding_id)
            mask = None if keep is None else torch.from_numpy(keep)
            pooled = pool(self.half(torch.from_numpy(block), mask), mask, self.manifest.pooling)
            if self.manifest.normalize:
                pooled = torch.nn.functional.normalize(pooled, dim=1)
            vectors[places] = pooled.numpy()
            on_batch(len(places))
        return vectors


def check_finite(vectors: NDArray[np.float32], text_of: Callable[[int], str]) -> None:
    """Refuse vectors with infinite or undefined numbers.

    Args:
        vectors: float32 [n, D].
        text_of: Row -> its text, for the sentence.

    Raises:
        EncoderError: If there is one; it names the first such text.
    """
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise EncoderError(
            f"the encoder gives no finite vector for the text {_shown(text_of(row))}: the model's "
            "weights may be damaged, or bfloat16 does not suit it (try --dtype float32)"
        )


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…")
