"""The steps that bring texts of the same baskets together: loss, optimiser, going on after a kill.

Shapes: B = distinct texts of a step, D = width, V = texts of the period, k = split layer, L =
layers.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from encoders.batches import TokenizedTexts
from encoders.checkpoint import (
    Checkpoint,
    SavedState,
    optimizer_tensors,
    restore_optimizer,
    with_prefix,
    without_prefix,
)
from encoders.config import TuningConfig
from encoders.cooccurrence import CoOccurrence
from encoders.devices import products_in
from encoders.schedule import warmup_cosine
from encoders.text_encoder import pool
from feature_repo.errors import EncoderError
from feature_repo.progress import Progress

CLIP_NORM = 1.0
"""Largest norm of a step's gradient, BERT's."""


def co_occurrence_loss(
    vectors: Float[Tensor, "B D"],
    counts: Float[Tensor, "B B"],
    popularity: Float[Tensor, " B"],
    temperature: float,
) -> Float[Tensor, ""]:
    """How much worse the vectors tell which texts go together than popularity alone does.

    With ``p_i = counts_i / sum(counts_i)`` and ``q_i = softmax_j(cos(i, j) / temperature + log
    popularity_j)`` over ``j != i``: ``KL(p_i || q_i)`` less the same of equal vectors, for which
    ``q_i`` is the popularity; the mean over the texts i with a partner in the batch, 0 if there is
    none. 0 = no better than popularity, below 0 = better. The difference removes what no vectors
    can tell, the noise of small counts, which is larger than what they can; the gradient is the
    same.

    With the popularity in the softmax the cosine need not tell it: it learns the lift over chance,
    and a batch of any composition has the same solution. With the next basket's counts this is
    InfoNCE in expectation over the positive, up to a constant.

    Args:
        vectors: Any length; the cosine divides by it.
        counts: At least 0; the diagonal is 0.
        popularity: Above 0; baskets that hold the text.
        temperature: Above 0.

    Source:
        InfoNCE: van den Oord et al., "Representation Learning with Contrastive Predictive Coding",
        2018, arXiv:1807.03748; positives weighted by their counts, popularity as in the correction
        for sampled softmax. That tuning pays: Chen et al., "HLLM", 2024, arXiv:2409.12740.
    """
    units = functional.normalize(vectors, dim=1)
    self_pairs = torch.eye(len(vectors), dtype=torch.bool)
    chance = popularity.log().expand(len(vectors), -1).masked_fill(self_pairs, -math.inf)
    logits = units @ units.T / temperature + chance
    # Both are -inf on the diagonal, where nothing is expected: their difference must not be met.
    excess = chance.log_softmax(dim=1) - logits.log_softmax(dim=1)
    total = counts.sum(dim=1, keepdim=True)
    target = counts / total.clamp(min=1)
    divergence = (target * excess.masked_fill(self_pairs, 0.0)).sum(dim=1)
    return divergence.sum() / (total > 0).sum().clamp(min=1)


class TuningState(SavedState):
    """What is kept of a tuning that is not finished, beside weights and the optimiser's moments."""

    losses: list[float]
    """One per step done."""


@dataclass
class Tuner:
    """Tunes a whole model in place so that its split layer tells which texts go together.

    The embedding table will hold the pooled states of layer k, so the loss is taken **there**, on
    vectors pooled as ``encode`` pools them; it trains the layers up to k. With ``final_weight``
    above 0 and k below L, the same loss at the last layer, so weighted, trains all layers: those
    above k stay a continuation that fits. With 0 the layers above k keep their weights.

    Dropout is off: with 100 steps there is nothing to guard against, and runs are repeatable.

    Args:
        model: A base model, float32, evaluation mode.
        split_layer: k.
        tokens: The V texts.
        padding_id: Token that fills up shorter texts.
        data: The V texts' partners.
        config: How.
    """

    model: PreTrainedModel
    split_layer: int
    tokens: TokenizedTexts
    padding_id: int
    data: CoOccurrence
    config: TuningConfig
    losses: list[float] = field(default_factory=list)
    """One per step done."""

    def __post_init__(self) -> None:
        num_layers: int = self.model.config.num_hidden_layers
        weights = {num_layers: self.config.final_weight} if self.config.final_weight else {}
        self._weights = {**weights, self.split_layer: 1.0}  # layer -> weight of its loss
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.config.learning_rate)
        popularity = np.sqrt(self.data.num_baskets)
        self._chances = popularity / popularity.sum()

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint[TuningState]) -> int:
        """Take the checkpoint's state, if it has one; the number of steps already done."""
        saved = checkpoint.load()
        if saved is None:
            return 0
        state, tensors = saved
        self.losses = state.losses
        self.model.load_state_dict(without_prefix("model", tensors), strict=False)
        restore_optimizer(self.model, self._optimizer, tensors)
        return len(self.losses)

    def run(self, checkpoint: Checkpoint[TuningState], progress: Progress) -> None:
        """Take the steps that are left, and keep the state after every few.

        Raises:
            EncoderError: If the loss is no longer finite.
        """
        num_steps = self.config.steps
        progress(len(self.losses), num_steps)
        while len(self.losses) < num_steps:
            factor = warmup_cosine(
                len(self.losses), num_steps=num_steps, warmup_steps=num_steps // 10
            )
            for group in self._optimizer.param_groups:
                group["lr"] = self.config.learning_rate * factor
            loss = self._step(self.draw(len(self.losses)))
            self.losses.append(loss)
            progress(1, num_steps, loss=loss)
            if (
                len(self.losses) % self.config.checkpoint_steps == 0
                or len(self.losses) == num_steps
            ):
                self._save(checkpoint)

    def draw(self, step: int) -> NDArray[np.int64]:
        """Choose the texts of a step, int64 [at most B], distinct.

        Texts come with probability ~ frequency^0.5. A partner of each of the first half is put
        behind that half, so that a batch has pairs however many texts there are; the rest is drawn
        like the first half. The choice depends on (seed, step) alone.
        """
        random = np.random.default_rng([self.config.seed, step])
        num = min(self.config.batch_texts, len(self._chances))
        drawn = random.choice(len(self._chances), size=num, replace=False, p=self._chances)
        half = drawn[: num // 2]
        partners = self.data.draw_partners(half, random)
        # dict.fromkeys keeps the first of equal ones, in order.
        return np.array(list(dict.fromkeys([*half, *partners, *drawn]))[:num], dtype=np.int64)

    def _step(self, rows: NDArray[np.int64]) -> float:
        """One update; the memory is that of one group of texts, not of the batch.

        The vectors are made once without gradients, the loss is taken back to them, then each group
        is made again and takes its vectors' gradients back to the weights.

        Source:
            Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
            2021, arXiv:2101.06983.
        """
        rows = rows[np.argsort(self.tokens.lengths[rows], kind="stable")]
        groups = np.array_split(rows, math.ceil(len(rows) / self.config.group_texts))
        with torch.no_grad():
            pooled = [self._vectors(group) for group in groups]
        vectors = [torch.cat(parts).requires_grad_() for parts in zip(*pooled, strict=True)]
        counts = torch.from_numpy(self.data.block(rows))
        popularity = torch.from_numpy(self.data.num_baskets[rows]).float()
        loss = torch.stack(
            [
                weight * co_occurrence_loss(v, counts, popularity, self.config.temperature)
                for v, weight in zip(vectors, self._weights.values(), strict=True)
            ]
        ).sum()
        if not torch.isfinite(loss):
            raise EncoderError(
                f"the loss became {loss.item()} in step {len(self.losses) + 1}: lower "
                "--learning-rate, or try --dtype float32"
            )
        gradients = torch.autograd.grad(loss, vectors)
        self._optimizer.zero_grad(set_to_none=True)
        start = 0
        for group in groups:
            part = slice(start, start + len(group))
            torch.autograd.backward(self._vectors(group), [g[part] for g in gradients])
            start = part.stop
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM, foreach=True)
        self._optimizer.step()
        return float(loss.detach())

    def _vectors(self, rows: NDArray[np.int64]) -> list[Tensor]:
        """Pooled states [B, D] of the texts at each layer that has a loss."""
        block, keep = self.tokens.block(rows, padding_id=self.padding_id)
        mask = None if keep is None else torch.from_numpy(keep)
        # Plain attention products: their backward takes half the time of the fused kernel's.
        with (
            sdpa_kernel(SDPBackend.MATH),
            products_in(self.config.dtype, torch.device("cpu")),
        ):
            states = self.model(
                input_ids=torch.from_numpy(block), attention_mask=mask, output_hidden_states=True
            ).hidden_states
        return [pool(states[layer], mask, self.config.encoder.pooling) for layer in self._weights]

    def _save(self, checkpoint: Checkpoint[TuningState]) -> None:
        state = TuningState(
            fingerprint=checkpoint.fingerprint,
            tensors=f"state-{len(self.losses)}.safetensors",
            losses=self.losses,
        )
        weights = with_prefix("model", dict(self.model.named_parameters()))
        checkpoint.save(state, weights | optimizer_tensors(self.model, self._optimizer))
