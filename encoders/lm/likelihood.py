"""How many bits a language model needs for a text: the measure by which models compare.

Bits per byte = negative log2 likelihood of a document's tokens, the end token included, over the
UTF-8 bytes of its text. Tokens of one vocabulary are worth more bytes than those of another, bytes
are bytes: models with different tokenizers compare.

Shapes: B = windows computed at once, T = tokens of the longest, C = context, V = vocabulary.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from encoders.config import Precision
from encoders.devices import products_in
from encoders.lm.documents import start_token, text_bytes, tokenize_documents
from encoders.lm.loss import IGNORED
from feature_repo.progress import Progress, silent

BATCH_TOKENS = 4096
"""Tokens computed at once, padding included."""
_CPU_BATCH_TOKENS = 512
"""Where all their logits are made at once on a CPU: 4,096 tokens of a vocabulary of 22,518 took a
quarter more time, for 370 MB of logits are fetched from memory again and again."""

TokenNats = Callable[[Tensor, Tensor], Tensor]
"""(token ids, targets), int64 [B, T] each -> negative log likelihood of each target in nats [B, U];
0 where the target is :data:`encoders.lm.loss.IGNORED`. Places ignored in all rows may be left out:
U <= T."""


@dataclass(frozen=True)
class Likelihood:
    """What a model makes of N documents.

    Args:
        bits: Negative log2 likelihood of each document's tokens, float64 [N].
        num_tokens: Of each document, the end token included, int64 [N].
        num_bytes: Of each text in UTF-8, int64 [N].
    """

    bits: NDArray[np.float64]
    num_tokens: NDArray[np.int64]
    num_bytes: NDArray[np.int64]

    @property
    def bits_per_byte(self) -> float:
        """All bits over all bytes; NaN without any byte."""
        total = int(self.num_bytes.sum())
        return float(self.bits.sum()) / total if total else math.nan


@dataclass(frozen=True)
class _Window:
    """Part of a document that is computed at once; its targets before ``first`` are not scored."""

    document: int
    start: int
    stop: int
    first: int


def measure_likelihood(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch_tokens: int | None = None,
    precision: Precision = "float32",
    progress: Progress = silent,
) -> Likelihood:
    """Bits that a causal model needs for texts; see :func:`document_bits`.

    Args:
        model: With a head over the vocabulary (``AutoModelForCausalLM``), on any device.
        tokenizer: The model's.
        texts: N documents without start and end token.
        batch_tokens: Tokens computed at once, None = what is quick on the model's device; moves
            speed and memory only.
        precision: Of the matrix products; the likelihood itself is float32.
        progress: Told tokens.

    Raises:
        EncoderError: If the tokenizer has no end token.
    """
    documents = tokenize_documents(tokenizer, texts)
    quick = _CPU_BATCH_TOKENS if model.device.type == "cpu" else BATCH_TOKENS
    chooses = "logits_to_keep" in inspect.signature(model.forward).parameters

    def tell(inputs: Tensor, targets: Tensor) -> Tensor:
        # Logits are most of a small model's work: not those that no row's target needs.
        kept = (targets != IGNORED).any(dim=0).nonzero()[:, 0]
        with products_in(precision, inputs.device):
            if chooses:
                logits = model(input_ids=inputs, use_cache=False, logits_to_keep=kept).logits
            else:
                logits = model(input_ids=inputs, use_cache=False).logits[:, kept]
        # Row by row, for the float32 copy of all logits would be many times the model.
        rows = zip(logits, targets[:, kept], strict=True)
        return torch.stack([_nats(row.float(), told) for row, told in rows])

    with _evaluating(model):
        bits = document_bits(
            tell,
            documents,
            start=start_token(tokenizer),
            context=model.config.max_position_embeddings,
            device=model.device,
            batch_tokens=batch_tokens or quick,
            progress=progress,
        )
    num_tokens = np.array([len(document) for document in documents], dtype=np.int64)
    return Likelihood(bits, num_tokens, text_bytes(texts))


@torch.no_grad()
def document_bits(
    tell: TokenNats,
    documents: Sequence[NDArray[np.int64]],
    *,
    start: int,
    context: int,
    device: torch.device,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
) -> NDArray[np.float64]:
    """Negative log2 likelihood of every document, float64 [N].

    Each token is told once, from the start token and the document's tokens before it. Of a document
    longer than the context C they are those of a window: the first window tells C tokens, each
    later one moves on by C/2 and tells the C/2 new ones, from at least C/2 before them.

    Documents of like length are computed together, filled up on the right: a causal model's tokens
    do not see what comes after them, so no mask is needed.

    Args:
        tell: Gives each target's negative log likelihood.
        documents: Token ids of each, the end token last.
        start: What the first token is told from.
        context: C.
        device: Where ``tell`` wants its tokens.
        batch_tokens: B x T at most, one window at least.
        progress: Told tokens.
    """
    windows = [w for i, d in enumerate(documents) for w in _windows(i, len(d), context)]
    # Beside like lengths, like beginnings of what is told.
    windows.sort(key=lambda w: (w.stop - w.start, w.stop - w.first), reverse=True)
    total = sum(len(document) for document in documents)
    nats = np.zeros(len(documents))
    progress(0, total)
    for batch in _batches(windows, batch_tokens):
        inputs, targets = _block(batch, documents, start)
        told = tell(inputs.to(device), targets.to(device))
        sums = told.double().sum(dim=1).cpu().numpy()
        np.add.at(nats, [window.document for window in batch], sums)
        progress(sum(window.stop - window.first for window in batch), total)
    return nats / math.log(2)


def _windows(document: int, length: int, context: int) -> Iterator[_Window]:
    """Cut a document's targets into windows."""
    yield _Window(document, 0, min(length, context), 0)
    told = context
    while told < length:
        new = min(max(1, context // 2), length - told)
        yield _Window(document, told + new - context, told + new, told)
        told += new


def _batches(windows: Sequence[_Window], batch_tokens: int) -> Iterator[Sequence[_Window]]:
    """Groups of neighbours that fit together; windows come longest first."""
    first = 0
    while first < len(windows):
        longest = windows[first].stop - windows[first].start
        last = first + max(1, batch_tokens // longest)
        yield windows[first:last]
        first = last


def _block(
    batch: Sequence[_Window], documents: Sequence[NDArray[np.int64]], start: int
) -> tuple[Tensor, Tensor]:
    """What the model is given and what it should tell, int64 [B, T] each."""
    longest = max(window.stop - window.start for window in batch)
    inputs = np.full((len(batch), longest), start, dtype=np.int64)
    targets = np.full((len(batch), longest), IGNORED, dtype=np.int64)
    for row, window in enumerate(batch):
        tokens = documents[window.document][window.start : window.stop]
        before = documents[window.document][window.start - 1] if window.start else start
        inputs[row, 0] = before
        inputs[row, 1 : len(tokens)] = tokens[:-1]
        new = window.first - window.start
        targets[row, new : len(tokens)] = tokens[new:]
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, then the mode as before."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
