"""What a pretraining will need of a number of GPUs: memory of each and of the machine, and time.

Shapes: N = weights, G = GPUs, L = layers, D = width, T = tokens of a row, R = rows of a pass.
"""

import math
from dataclasses import dataclass

from encoders.lm.model import PLANNED_VOCABULARY, count_parameters
from encoders.lm.recipes import ModelShape, PretrainingConfig
from encoders.lm.throughput import PEAK_FLOPS
from feature_repo.errors import EncoderError

GIB = 2**30
_FLOAT32, _BFLOAT16 = 4, 2
"""Bytes of a number."""
_KEPT_FACTOR = 34
"""Bytes per token, layer and width that a layer keeps for its gradient without checkpointing, where
attention keeps no scores: Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models", 2022, arXiv:2205.05198, equation 2."""
_RESERVED_SHARE = 0.08
"""Of the memory, for the framework, communication and fragments: what torch needs of an 80 GB card
beside its tensors."""
_DEFAULT_SHARE = 0.4
"""Of the peak, that trainings of this size reach: Llama 3 405B 38 to 43 % (arXiv:2407.21783, table
4), PaLM 46 % (arXiv:2204.02311, table 3)."""
_DEFAULT_PEAK = PEAK_FLOPS["H100"] / 1e12


@dataclass(frozen=True)
class Cluster:
    """What there is to compute with.

    Raises:
        EncoderError: If a value is not above 0.
    """

    gpus: int
    gpu_memory_gb: float
    """Of each, in GiB."""
    peak_tflops: float = _DEFAULT_PEAK
    """Of each, in the training's arithmetic."""
    share_of_peak: float = _DEFAULT_SHARE
    """That the training is assumed to reach, in (0, 1]."""

    def __post_init__(self) -> None:
        for name in ("gpus", "gpu_memory_gb", "peak_tflops", "share_of_peak"):
            if not getattr(self, name) > 0:
                raise EncoderError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.share_of_peak > 1:
            raise EncoderError(f"share_of_peak must be in (0, 1], got {self.share_of_peak}")


@dataclass(frozen=True)
class Plan:
    """Memory in GiB, of each GPU where nothing else is said, and time."""

    recipe: str
    num_parameters: int
    gpus: int
    pass_rows: int
    """Rows that a GPU computes at once: the recipe's, or the most that fit."""
    weights_gb: float
    """float32, shared out."""
    gradients_gb: float
    """float32, shared out."""
    optimizer_gb: float
    """Two float32 moments, shared out."""
    gathered_gb: float
    """bfloat16 weights of the layer that runs and the next one, and of the embeddings."""
    activations_gb: float
    total_gb: float
    """With what the framework needs."""
    host_gb: float
    """Beside the GPU's, of the main process when it keeps a state: float32 weights and two moments,
    whole. Another process holds at most the weights, and none where they are shared out."""
    fits: bool
    tokens: float
    tokens_per_step: int
    steps: int
    operations_per_token: float
    """Of the model; what is computed again for checkpointing is not counted."""
    tokens_per_s: float
    """All GPUs together."""
    days: float


def plan(
    config: PretrainingConfig,
    cluster: Cluster,
    *,
    tokens: float | None = None,
    vocab_size: int = PLANNED_VOCABULARY,
) -> Plan:
    """Estimate memory and time of a pretraining.

    Memory: 16 bytes per weight (float32 weights, gradients and two moments) over G, plus gathered
    bfloat16 weights, plus activations: ``34 R T D`` bytes per layer (:data:`_KEPT_FACTOR`), or with
    checkpointing ``2 R T D`` per layer and all of one layer. The main process' own memory: 12 bytes
    per weight. Operations per token: ``6 N + 12 L D T``, the latter attention's, as if it saw all
    of the row.

    Args:
        config: Of the training.
        cluster: GPUs.
        tokens: To learn from; None = the recipe's steps.
        vocab_size: V.

    Raises:
        EncoderError: If tokens are neither given nor known from the recipe, or not above 0.

    Source:
        Rajbhandari et al., "ZeRO", 2019, arXiv:1910.02054, section 3.1 (16 bytes per weight);
        Chowdhery et al., "PaLM", 2022, arXiv:2204.02311, appendix B (operations per token).
    """
    shape, learning = config.shape, config.learning
    tokens_per_step = learning.batch_rows * shape.sequence_length
    if tokens is None:
        if learning.steps is None:
            raise EncoderError(
                f"recipe {config.recipe} learns for some minutes, however many tokens these give: "
                "say how many with --tokens"
            )
        tokens = float(learning.steps * tokens_per_step)
    if not tokens > 0:
        raise EncoderError(f"tokens must be above 0, got {tokens}")
    weights = count_parameters(shape, vocab_size)
    shards = cluster.gpus if learning.sharded else 1
    shared = weights * _FLOAT32 / shards
    gathered = _gathered_bytes(shape, vocab_size) if shards > 1 else weights * _BFLOAT16
    fixed = 4 * shared + gathered + _RESERVED_SHARE * cluster.gpu_memory_gb * GIB
    row = _row_bytes(shape, checkpointed=learning.checkpoint_activations)
    room = int((cluster.gpu_memory_gb * GIB - fixed) // row)
    own_rows = math.ceil(learning.batch_rows / cluster.gpus)
    rows = max(1, min(learning.pass_rows, own_rows, room))
    total = fixed + rows * row
    operations = 6 * weights + 12 * shape.num_layers * shape.hidden_size * shape.sequence_length
    rate = cluster.gpus * cluster.peak_tflops * 1e12 * cluster.share_of_peak / operations
    return Plan(
        recipe=config.recipe,
        num_parameters=weights,
        gpus=cluster.gpus,
        pass_rows=rows,
        weights_gb=shared / GIB,
        gradients_gb=shared / GIB,
        optimizer_gb=2 * shared / GIB,
        gathered_gb=gathered / GIB,
        activations_gb=rows * row / GIB,
        total_gb=total / GIB,
        host_gb=3 * weights * _FLOAT32 / GIB,
        fits=total <= cluster.gpu_memory_gb * GIB,
        tokens=tokens,
        tokens_per_step=tokens_per_step,
        steps=math.ceil(tokens / tokens_per_step),
        operations_per_token=operations,
        tokens_per_s=rate,
        days=tokens / rate / 86_400,
    )


def _gathered_bytes(shape: ModelShape, vocab_size: int) -> float:
    """Weights that lie whole on every GPU: two layers', and the embeddings of both ends."""
    embeddings = vocab_size * shape.hidden_size * (1 if shape.tied else 2)
    layers = count_parameters(shape, vocab_size) - embeddings
    return _BFLOAT16 * (embeddings + 2 * layers / shape.num_layers)


def _row_bytes(shape: ModelShape, *, checkpointed: bool) -> float:
    """What a row keeps for its gradient."""
    states = shape.sequence_length * shape.hidden_size
    whole = _KEPT_FACTOR * states
    if not checkpointed:
        return float(whole * shape.num_layers)
    return float(_BFLOAT16 * states * shape.num_layers + whole)
