"""Every pretraining that has a name: functions that return a full configuration.

This module imports neither torch nor transformers, so that the command line's help is quick.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from encoders.config import Precision
from feature_repo.errors import EncoderError

Optimizer = Literal["adamw", "muon"]


@dataclass(frozen=True)
class ModelShape:
    """A Llama: rotary positions, RMSNorm, SwiGLU, queries that share keys and values.

    Raises:
        EncoderError: If the numbers do not fit together.

    Source:
        Touvron et al., "Llama 2", 2023, arXiv:2307.09288; the architecture of LiLiuM, Herold et
        al., 2024, arXiv:2406.12023, and of transformers' ``LlamaConfig``.
    """

    hidden_size: int
    """D, a multiple of ``num_heads``."""
    intermediate_size: int
    """Inner width of SwiGLU."""
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    """Divides ``num_heads``."""
    sequence_length: int
    """Tokens of a row, and the longest context that the model is made for."""
    tied: bool = False
    """The output has the input's embeddings: fewer weights, for models whose vocabulary is most of
    them."""
    rope_theta: float = 10_000.0
    """Base of the rotary positions' wavelengths."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name != "tied" and not value > 0:
                raise EncoderError(f"{one.name} must be above 0, got {value}")
        if self.hidden_size % (2 * self.num_heads):
            raise EncoderError(
                f"hidden_size must be a multiple of twice num_heads ({2 * self.num_heads}), for "
                f"rotary positions turn pairs, got {self.hidden_size}"
            )
        if self.num_heads % self.num_key_value_heads:
            raise EncoderError(
                f"num_heads must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads}), got {self.num_heads}"
            )


@dataclass(frozen=True)
class LearningConfig:
    """How the weights of a language model are learned, from whatever batches.

    Raises:
        EncoderError: If a value is outside its range.
    """

    steps: int | None = None
    """Updates of the weights; None = as many as fit into ``minutes``."""
    minutes: float | None = None
    """Time to learn for, without validations. How many steps that are is measured once, at the
    beginning, so that a run that goes on after a kill ends with the same weights."""
    batch_rows: int = 1024
    """Rows of a step, of all processes together."""
    pass_rows: int = 4
    """Rows that a process computes at once; the gradients of a step's passes are added up."""
    optimizer: Optimizer = "adamw"
    """``muon``: the layers' matrices by Muon, the rest by AdamW; it needs whole matrices, so no
    ``sharded``."""
    learning_rate: float = 3e-4
    """Highest, of both optimisers."""
    final_share: float = 0.1
    """The cosine ends at this share of it."""
    warmup_steps: int = 2000
    """Of linear warm-up; at most a tenth of all steps."""
    weight_decay: float = 0.1
    """Of matrices; vectors have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    precision: Precision = "bfloat16"
    """Of matrix products; weights, loss and optimiser are float32."""
    checkpoint_activations: bool = False
    """Compute each layer again for its gradient: memory of one, a third more time."""
    sharded: bool = False
    """Processes share out weights, gradients and the optimiser's state (FSDP), not only rows."""
    compiled: bool = False
    """Let torch.compile fuse the layers; needs a C++ compiler on CPUs."""
    checkpoint_steps: int = 1000
    """Steps that a kill can lose at most."""
    num_snapshots: int = 8
    """Weights kept for averaging, evenly over ``snapshot_share`` of the run; the last are the
    model's. 0 = none."""
    snapshot_share: float = 0.2
    """Older weights are too far behind: in a short run of one seed the mean over the last fifth was
    .0003 bits per byte better than the best of them, over the last two fifths .0033 worse."""
    num_validations: int = 10
    max_spikes: int = 5
    """Steps skipped among the last :data:`encoders.lm.spikes.WINDOW` before the training stops."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("precision", Precision), ("optimizer", Optimizer)):
            value = getattr(self, name)
            if value not in get_args(allowed):
                choices = ", ".join(get_args(allowed))
                raise EncoderError(f"{name} must be one of {choices}, got {value!r}")
        if self.optimizer == "muon" and self.sharded:
            raise EncoderError("muon needs whole matrices: leave sharded out, or take adamw")
        if (self.steps is None) == (self.minutes is None):
            raise EncoderError("a training takes either steps or minutes")
        lowest = {"num_validations": 0, "num_snapshots": 0, "max_spikes": 0, "seed": 0}
        lowest |= {"warmup_steps": 0, "weight_decay": 0}
        lowest |= {"batch_rows": 1, "pass_rows": 1, "checkpoint_steps": 1, "steps": 1}
        for name, least in lowest.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise EncoderError(f"{name} must be at least {least}, got {value}")
        for name in ("learning_rate", "clip_norm", "minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise EncoderError(f"{name} must be above 0, got {value}")
        for name in ("final_share", "snapshot_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise EncoderError(f"{name} must be in [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True)
class PretrainingConfig:
    """A model, and how it learns from the corpus.

    Raises:
        EncoderError: If a value is outside its range.
    """

    recipe: str
    shape: ModelShape
    learning: LearningConfig
    validation_bytes: int = 100_000
    """Of each source, in whole documents, at least one."""
    general_share: float | None = None
    """Of general text in the mixture; None = as the corpus says."""

    def __post_init__(self) -> None:
        if self.validation_bytes < 1:
            raise EncoderError(f"validation_bytes must be above 0, got {self.validation_bytes}")
        if self.general_share is not None and not 0 <= self.general_share <= 1:
            raise EncoderError(f"general_share must be in [0, 1], got {self.general_share}")


def tiny() -> PretrainingConfig:
    """A model for two cores and some minutes: small, with many small steps (docs/log.md)."""
    return PretrainingConfig(
        recipe="tiny",
        shape=ModelShape(
            hidden_size=256,
            intermediate_size=768,
            num_layers=2,
            num_heads=4,
            num_key_value_heads=2,
            sequence_length=256,
            tied=True,
        ),
        learning=LearningConfig(
            minutes=8,
            batch_rows=8,
            pass_rows=8,
            optimizer="muon",
            learning_rate=3e-3,
            warmup_steps=50,
            final_share=0.3,  # the average of the last weights does the rest (docs/log.md)
            checkpoint_steps=200,
            num_validations=5,
        ),
        validation_bytes=50_000,
    )


_LARGE = LearningConfig(
    steps=715_000, checkpoint_activations=True, sharded=True, compiled=True, num_validations=100
)
"""Llama 2's: 3e-4, cosine to a tenth, 2000 steps of warm-up, 4 million tokens a step
(arXiv:2307.09288, section 2.2), over LiLiuM's 3 trillion tokens (arXiv:2406.12023)."""


def one_billion() -> PretrainingConfig:
    """1.0 billion weights with a vocabulary of 65,536."""
    shape = ModelShape(
        hidden_size=2048,
        intermediate_size=7168,
        num_layers=16,
        num_heads=32,
        num_key_value_heads=8,
        sequence_length=4096,
        tied=True,
        rope_theta=_LONG,
    )
    learning = replace(_LARGE, learning_rate=4e-4, pass_rows=8, checkpoint_activations=False)
    return PretrainingConfig("1b", shape, learning)


def seven_billion() -> PretrainingConfig:
    """7.0 billion weights with a vocabulary of 65,536."""
    shape = ModelShape(
        hidden_size=4096,
        intermediate_size=13_056,
        num_layers=32,
        num_heads=32,
        num_key_value_heads=8,
        sequence_length=4096,
        rope_theta=_LONG,
    )
    return PretrainingConfig("7b", shape, _LARGE)


def thirteen_billion() -> PretrainingConfig:
    """12.9 billion weights with a vocabulary of 65,536."""
    shape = ModelShape(
        hidden_size=5120,
        intermediate_size=15_872,
        num_layers=40,
        num_heads=40,
        num_key_value_heads=8,
        sequence_length=4096,
        rope_theta=_LONG,
    )
    return PretrainingConfig("13b", shape, replace(_LARGE, pass_rows=2))


_LONG = 500_000.0
"""Rotary base, with keys shared by several queries, of Llama 3 (arXiv:2407.21783, section 3.2)."""

RECIPES: dict[str, Callable[[], PretrainingConfig]] = {
    "tiny": tiny,
    "1b": one_billion,
    "7b": seven_billion,
    "13b": thirteen_billion,
}

CONTINUED_RATE_SHARE = 0.1
"""Of the original's highest learning rate where a model goes on, e-Llama, arXiv:2501.09706."""
