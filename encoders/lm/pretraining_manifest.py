"""What a pretrained model tells of itself: ``pretraining.json`` in its folder."""

from typing import Any, Literal

from pydantic import AwareDatetime

from encoders.lm.learning_state import CurvePoint, RunManifest, Validation


class PretrainingManifest(RunManifest):
    """What a model was made from, and how it went."""

    format: Literal[1] = 1
    created: AwareDatetime
    recipe: str
    base_model: str | None
    """Folder of the model that went on; None = from nothing."""
    base_model_fingerprint: str | None
    config: dict[str, Any]
    """:class:`encoders.lm.recipes.PretrainingConfig`, as it was used. Its shape is the model's,
    also where that went on and the recipe says another."""
    num_parameters: int
    vocab_size: int
    tokenizer: str
    """Fingerprint."""
    corpus: str
    """Fingerprint."""
    dataset: str
    until: AwareDatetime
    """Only documents before it were learned from."""
    mixture: dict[str, float]
    """Source -> share of the tokens."""
    steps: int
    num_tokens: int
    """Learned from."""
    seconds: float
    """Spent in steps."""
    tokens_per_s: float
    matmul_rate: float | None
    """Operations per second that the model's matrix products reach alone, one process'."""
    matmul_share: float | None
    """Of it, that the training reached; see :mod:`encoders.lm.throughput`."""
    peak_share: float | None
    """Of the operations per second that the card's maker promises; None on a CPU or another card
    than :data:`encoders.lm.throughput.PEAK_FLOPS` has. What is computed again is not counted."""
    device: str
    num_processes: int
    num_threads: int
    skipped_steps: list[int]
    """Left out for their loss leapt."""
    curve: list[CurvePoint]
    validations: list[Validation]
    """Bits per byte on the valid split by source, ``all`` = together."""
    snapshots: list[int]
    """Steps whose weights are kept."""
    seed: int
    git_revision: str | None
