"""How the click models are built: frozen dataclasses, checked when made.

The command line reads this module for its help: it imports nothing that takes long.
"""

from dataclasses import dataclass

AGE_SCALES_DAYS = (3.0, 10.0, 30.0, 90.0, 270.0, 1000.0)
"""Where the learned decay times start: a few days to years, three per factor of ten or so."""


def _at_least(low: int, **values: int) -> None:
    for name, value in values.items():
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")


def _share(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")


@dataclass(frozen=True)
class BaheConfig:
    """The model of :mod:`training.model`."""

    use_deep_half: bool = True
    """False: the vectors are pooled without the language model's upper layers."""
    num_deep_layers: int | None = None
    """How many layers above the split are used; None = all of them."""
    deep_length: int = 30
    """L, how many of the newest behaviours of a scene the deep half reads."""
    deep_dropout: float = 0.0
    """Inside the deep half while it learns."""
    use_bfloat16: bool = True
    """The deep half learns in bfloat16; scores are float32 always."""
    input_scale: float = 1.0
    """Factor on table vectors before the deep half, per dimension; learned from there."""
    use_age: bool = True
    """Add an embedding of the age to each behaviour."""
    num_age_buckets: int = 16
    """Buckets of doubling length from an hour on; 16 reach 3.7 years."""
    output_width: int = 32
    """Q, width of a scene's and of an item's deep output."""
    use_exact_evidence: bool = True
    """Whether, how often and how long ago the candidate itself is in the history."""
    use_text_evidence: bool = True
    """Cosines of the candidate's text with those of the history."""
    text_length: int = 50
    """How many of the newest behaviours of a scene the text evidence reads."""
    num_kernels: int = 6
    """K, cosine kernels."""
    num_age_scales: int = 6
    """A, learned decay times of the evidence."""
    num_bins: int = 24
    """Quantile bins per numeric feature."""
    numeric_width: int = 8
    """Values per numeric feature after its encoding."""
    num_crosses: int = 2
    cross_rank: int = 32
    hidden: tuple[int, ...] = (256, 128)
    """Widths of the head's hidden layers."""
    dropout: float = 0.2
    """After each hidden layer of the head."""
    input_dropout: float = 0.1
    """On the head's input: deep outputs and item features tell items apart well enough to learn by
    heart which ones sold in the training period."""

    def __post_init__(self) -> None:
        _at_least(
            1,
            deep_length=self.deep_length,
            text_length=self.text_length,
            output_width=self.output_width,
            num_bins=self.num_bins,
            numeric_width=self.numeric_width,
            cross_rank=self.cross_rank,
        )
        _at_least(2, num_age_buckets=self.num_age_buckets, num_kernels=self.num_kernels)
        _at_least(0, num_crosses=self.num_crosses)
        if self.num_deep_layers is not None:
            _at_least(1, num_deep_layers=self.num_deep_layers)
        if not 1 <= self.num_age_scales <= len(AGE_SCALES_DAYS):
            raise ValueError(
                f"num_age_scales must be in [1, {len(AGE_SCALES_DAYS)}], got {self.num_age_scales}"
            )
        if self.input_scale <= 0:
            raise ValueError(f"input_scale must be above 0, got {self.input_scale}")
        _share(
            deep_dropout=self.deep_dropout, dropout=self.dropout, input_dropout=self.input_dropout
        )


@dataclass(frozen=True)
class PopularityConfig:
    """Ranks by how often the item was sold lately, whoever asks (:mod:`training.baselines`)."""

    popularity_suffix: str = "_count_90d"
    """The item features whose names end so are added up."""


@dataclass(frozen=True)
class RepeatCountConfig:
    """Ranks by how often the candidate is in the user's history, then by popularity."""

    popularity_suffix: str = "_count_90d"
    """The item features whose names end so break ties."""


@dataclass(frozen=True)
class MeanPoolingConfig:
    """Mean of the history's text vectors beside the candidate's; no ids, no other features."""

    output_width: int = 64
    hidden: tuple[int, ...] = (128, 64)
    dropout: float = 0.1

    def __post_init__(self) -> None:
        _at_least(1, output_width=self.output_width)
        _share(dropout=self.dropout)


@dataclass(frozen=True)
class DinTextConfig:
    """Target attention over frozen text vectors; no ids, no other features."""

    output_width: int = 64
    attention_hidden: int = 32
    hidden: tuple[int, ...] = (128, 64)
    dropout: float = 0.1

    def __post_init__(self) -> None:
        _at_least(1, output_width=self.output_width, attention_hidden=self.attention_hidden)
        _share(dropout=self.dropout)


@dataclass(frozen=True)
class ItemOnlyConfig:
    """A network on item features alone: what it reaches is what the sampling of negatives leaks."""

    num_bins: int = 24
    numeric_width: int = 8
    hidden: tuple[int, ...] = (128, 64)
    dropout: float = 0.1

    def __post_init__(self) -> None:
        _at_least(1, num_bins=self.num_bins, numeric_width=self.numeric_width)
        _share(dropout=self.dropout)


ModelConfig = (
    BaheConfig
    | PopularityConfig
    | RepeatCountConfig
    | MeanPoolingConfig
    | DinTextConfig
    | ItemOnlyConfig
)
