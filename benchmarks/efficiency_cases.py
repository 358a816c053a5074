"""One training step of the full text and of BAHE: models, inputs, memory, FLOPs.

Shapes: B = contexts, C = candidates per context, M = behaviours of a history, D = width.

Both read the same histories and candidates with the models of :mod:`training`: the full text is the
``full_text`` model over all layers; BAHE is the ``bahe`` model over vectors of behaviours that are
there already, its deep half the upper layers. Both have one scene, the same head on the outputs
alone, the same precision and the same optimiser.
"""

import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaModel

from benchmarks.process_memory import peak_bytes, resident_bytes
from encoders.batches import TokenizedTexts
from encoders.split import DeepHalf, ShallowHalf
from training.build import build_model, fit_inputs
from training.config import BaheConfig, FullTextConfig
from training.optimization import make_optimizer
from training.recipes import TrainingConfig
from training.schema import InputSchema
from training.text_tokens import BehaviorTokens

Method = Literal["full_text", "bahe"]

FORWARD_AND_BACKWARD = 3
"""A backward pass multiplies twice as much as a forward pass."""
_ENCODED_TEXTS = 256
"""Texts per batch where the shallow half is timed."""


@dataclass(frozen=True)
class Backbone:
    """A Llama configuration: rotary positions, grouped queries, random weights."""

    width: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    inner_width: int
    """Of the gated MLP."""
    vocabulary: int

    def config(self, num_layers: int, num_positions: int) -> LlamaConfig:
        """Of a model of the first ``num_layers`` layers."""
        return LlamaConfig(
            hidden_size=self.width,
            num_hidden_layers=num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            intermediate_size=self.inner_width,
            vocab_size=self.vocabulary,
            max_position_embeddings=num_positions,
            use_cache=False,
        )

    @property
    def layer_weights(self) -> int:
        """Weights of a layer's matrices."""
        key_value_width = self.width // self.num_heads * self.num_key_value_heads
        attention = 2 * self.width * self.width + 2 * self.width * key_value_width
        return attention + 3 * self.width * self.inner_width

    def forward_flops(self, num_layers: int, length: int) -> float:
        """Multiplications and additions of one sequence through ``num_layers`` layers.

        ``2 weights length`` for the matrices and ``4 width length^2 / 2`` for attention scores and
        sums: each token sees only those before it.
        """
        return num_layers * (2.0 * self.layer_weights * length + 2.0 * self.width * length**2)


BACKBONES = {
    "small": Backbone(384, 12, 6, 2, 1024, 8192),
    # The sizes of TinyLlama-1.1B (arXiv:2401.02385).
    "1b": Backbone(2048, 22, 32, 4, 5632, 32000),
    "tiny": Backbone(32, 4, 4, 2, 64, 64),
}
"""By name: two CPU cores, one large GPU, tests."""


@dataclass(frozen=True)
class Case:
    """What one process measures."""

    method: Method
    backbone: Backbone
    num_layers: int
    """That learn: all, or those of the deep half."""
    num_behaviors: int
    tokens_per_behavior: int
    num_contexts: int
    num_candidates: int
    device: str
    threads: int
    use_bfloat16: bool
    gradient_checkpointing: bool

    @property
    def num_tokens(self) -> int:
        """Of a history's text."""
        return self.num_behaviors * self.tokens_per_behavior

    @property
    def num_texts(self) -> int:
        """Distinct texts of a batch: every behaviour and every candidate has one of its own."""
        return self.num_contexts * (self.num_behaviors + self.num_candidates)

    def step_flops(self) -> float:
        """Of the language model's layers in one step, forward and backward; the rest is small."""
        full = self.method == "full_text"
        user, item = self.num_behaviors, 1
        if full:
            user, item = user * self.tokens_per_behavior, self.tokens_per_behavior
        of = self.backbone.forward_flops
        per_context = of(self.num_layers, user) + self.num_candidates * of(self.num_layers, item)
        return FORWARD_AND_BACKWARD * self.num_contexts * per_context


class TrainingStep:
    """A model with its optimiser and one batch; :meth:`run` learns from the batch once.

    Args:
        case: What is built.
    """

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        schema = InputSchema(
            scenes=("view",),
            sequence_length=case.num_behaviors,
            vector_width=case.backbone.width,
            user_dense_names=(),
            item_dense_names=(),
            context_names=(),
            evidence_names=(),
            category_vocabularies={},
        )
        self._model = _make_model(case, schema)
        vectors, behaviors = _make_texts(case)
        empty = np.empty((1, 0), dtype=np.float32)
        dense = (empty, empty, empty, empty)
        fit_inputs(self._model, vectors, dense, base_rate=0.2, behaviors=behaviors)
        self._model.to(case.device).train()
        self._inputs = [t.to(case.device) for t in _make_inputs(case, vectors)]
        block = (case.num_contexts, case.num_candidates)
        self._labels = torch.arange(block[0] * block[1]).reshape(block).remainder(2).float()
        self._labels = self._labels.to(case.device)
        self._config = TrainingConfig()
        self._optimizer = make_optimizer(self._model, self._config)
        self._device = case.device

    def run(self) -> float:
        """Forward, backward, clipping and optimiser.

        Returns:
            Seconds.
        """
        synchronize(self._device)
        started = time.perf_counter()
        loss = self.loss()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._model.parameters(), self._config.clip_norm, foreach=True)
        self._optimizer.step()
        synchronize(self._device)
        return time.perf_counter() - started

    def loss(self) -> Tensor:
        """Of the batch."""
        logits = self._model(*self._inputs).reshape(*self._labels.shape, -1)
        labels = self._labels.unsqueeze(-1).expand_as(logits)  # of every member, where there are
        return functional.binary_cross_entropy_with_logits(logits, labels)

    def state_bytes(self) -> int:
        """Of weights, gradients and optimiser states: what stays between steps, after the first."""
        parameters = [p for p in self._model.parameters() if p.grad is not None]
        states = [t for state in self._optimizer.state.values() for t in state.values()]
        kept = [*self._model.parameters(), *self._model.buffers(), *states]
        kept += [p.grad for p in parameters if p.grad is not None]
        return sum(t.numel() * t.element_size() for t in kept)


def _make_model(case: Case, schema: InputSchema) -> nn.Module:
    """The model of :mod:`training`; of the backbone only the layers that it needs are made."""
    if case.method == "full_text":
        window = case.num_tokens
        full_text = FullTextConfig(
            num_tokens=window,
            max_tokens_per_behavior=case.tokens_per_behavior,
            use_bfloat16=case.use_bfloat16,
            gradient_checkpointing=case.gradient_checkpointing,
        )
        return build_model(
            full_text, schema, LlamaModel(case.backbone.config(case.num_layers, window))
        )
    bahe = BaheConfig(
        deep_length=case.num_behaviors,
        use_bfloat16=case.use_bfloat16,
        gradient_checkpointing=case.gradient_checkpointing,
        use_exact_evidence=False,
        use_neighbor_evidence=False,
        use_text_evidence=False,
        use_target_attention=False,
        num_members=1,  # the same head as the full text's
    )
    # The cut needs a layer below it, which goes at once.
    whole = LlamaModel(case.backbone.config(case.num_layers + 1, max(case.num_behaviors, 2)))
    return build_model(bahe, schema, DeepHalf(whole, 1))


def _make_texts(case: Case) -> tuple[np.ndarray[Any, np.dtype[np.float32]], BehaviorTokens]:
    """A table of vectors, row 0 = no text, and the tokens of its texts."""
    generator = np.random.default_rng(0)
    shape = (case.num_texts + 1, case.backbone.width)
    vectors = generator.standard_normal(shape, dtype=np.float32)
    vectors[0] = 0
    lengths = np.full(case.num_texts, case.tokens_per_behavior)
    ids = generator.integers(1, case.backbone.vocabulary, lengths.sum())
    return vectors, BehaviorTokens((), TokenizedTexts(ids, lengths))


def _make_inputs(case: Case, vectors: np.ndarray[Any, np.dtype[np.float32]]) -> list[Tensor]:
    """The program's inputs: full histories, no two texts alike, no features beside them."""
    contexts, behaviors, candidates = case.num_contexts, case.num_behaviors, case.num_candidates
    rows = torch.arange(1, case.num_texts + 1)
    history = rows[: contexts * behaviors].reshape(contexts, 1, behaviors)
    titles = rows[contexts * behaviors :].reshape(contexts, candidates)
    ages = torch.arange(behaviors, 0, -1).float().expand(contexts, 1, behaviors) * 3600
    return [
        torch.from_numpy(vectors),
        history,
        history.clone(),
        ages.contiguous(),
        torch.full((contexts, 1), float(behaviors)),
        torch.zeros(contexts, 0),
        titles,
        titles.clone(),
        torch.zeros(contexts, candidates, 0),
        torch.zeros(contexts, candidates, 0, dtype=torch.int64),
        torch.zeros(contexts, candidates, 0),
        torch.zeros(contexts, candidates, 0),
    ]


def serve(case: Case, connection: Connection) -> None:
    """Take steps in a process of its own: ``step`` is answered with its seconds, then ``memory``.

    Memory is what the process holds at most, less what it held before the model was made: weights,
    gradients, optimiser states and activations, but not Python and its libraries.
    """
    torch.set_num_threads(case.threads)
    square = torch.ones(64, 64, device=case.device)
    (square @ square).sum().item()  # what the first product makes the libraries load
    before = resident_bytes()
    step = TrainingStep(case)
    while (message := connection.recv()) != "stop":
        if message == "step":
            connection.send(step.run())
        elif case.device == "cuda":
            peak = torch.cuda.max_memory_allocated()
            connection.send({"peak": peak, "state": step.state_bytes(), "process_peak": peak})
        else:
            peak = peak_bytes()
            connection.send(
                {"peak": peak - before, "state": step.state_bytes(), "process_peak": peak}
            )


def encode_seconds_per_text(
    backbone: Backbone, split_layer: int, tokens: int, device: str, *, use_bfloat16: bool
) -> float:
    """Time of one text through the frozen shallow half; the best of three batches."""
    torch.manual_seed(0)
    model = LlamaModel(backbone.config(split_layer, tokens))
    half = ShallowHalf(model, split_layer).to(device).eval()
    ids = torch.randint(1, backbone.vocabulary, (_ENCODED_TEXTS, tokens), device=device)
    seconds = []
    with (
        torch.inference_mode(),
        torch.autocast(device, dtype=torch.bfloat16, enabled=use_bfloat16),
    ):
        for _ in range(4):
            synchronize(device)
            started = time.perf_counter()
            half(ids).mean(1)
            synchronize(device)
            seconds.append(time.perf_counter() - started)
    return min(seconds[1:]) / _ENCODED_TEXTS


def peak_flops_per_s(device: str, *, use_bfloat16: bool, size: int) -> float:
    """The best rate of square matrix products: the machine's limit, as measured."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if use_bfloat16 else None)
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def synchronize(device: str) -> None:
    """Wait until the device has done what it was asked."""
    if device == "cuda":
        torch.cuda.synchronize()
