"""How the click models are built: frozen dataclasses, checked when made.

The command line reads this module for its help: it imports nothing that takes long.
"""

from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

AGE_SCALES_DAYS = (3.0, 10.0, 30.0, 90.0, 270.0, 1000.0)
"""Where the learned decay times start: a few days to years, three per factor of ten or so."""

Position = Literal["distance", "none"]
Pooling = Literal["mean_newest", "mean", "newest", "attention"]
FineTune = Literal["full", "lora", "frozen"]
AttentionOver = Literal["texts", "states"]


def _at_least(low: int, **values: int) -> None:
    for name, value in values.items():
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")


def _share(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")


def _one_of(allowed: tuple[str, ...], **values: str) -> None:
    for name, value in values.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


class UsesEvidence(Protocol):
    """A config with a switch for each kind of evidence."""

    @property
    def use_exact_evidence(self) -> bool:
        """``same``."""

    @property
    def use_neighbor_evidence(self) -> bool:
        """``near``."""

    @property
    def use_text_evidence(self) -> bool:
        """``text``."""


def evidence_kinds(config: UsesEvidence) -> tuple[str, ...]:
    """The kinds of :mod:`encoders.evidence` that are switched on."""
    uses = {
        "same": config.use_exact_evidence,
        "near": config.use_neighbor_evidence,
        "text": config.use_text_evidence,
    }
    return tuple(kind for kind, used in uses.items() if used)


@dataclass(frozen=True)
class BaheConfig:
    """The model of :mod:`training.model`."""

    use_text: bool = True
    """False: nothing of any text: no deep outputs, no text evidence, no attention over texts."""
    use_deep_half: bool = True
    """False: the vectors are pooled without the language model's upper layers."""
    num_deep_layers: int | None = None
    """How many layers above the split are used; None = all of them."""
    deep_length: int = 30
    """L, how many of the newest behaviours of a scene the deep half reads."""
    share_scenes: bool = True
    """One deep half for all scenes; False: a copy for each, items go through the first scene's."""
    position: Position = "distance"
    """Added to each behaviour: a learned embedding of its distance from the newest; ``none``: only
    what the language model does itself, which for one with rotary positions is enough."""
    pooling: Pooling = "mean_newest"
    """From the states of a sequence to one vector: their mean and the newest side by side, one of
    the two, or a mean whose weights a learned query gives."""
    fine_tune: FineTune = "full"
    """The deep half's weights: all learn, ``lora``: adapters beside its linear layers (needs the
    extra ``lora``), ``frozen``: none. Adapters learn at ``deep_learning_rate`` too, and usually
    want about ten times as much as the weights."""
    num_trained_layers: int | None = None
    """How many of the deep half's layers learn, from the top: with the norm above them, where there
    is one. Those below keep their pretrained weights; of ``lora``, they have no adapters. None =
    all of the deep half learns."""
    lora_rank: int = 8
    """Inner width of an adapter."""
    gradient_checkpointing: bool = False
    """Compute the deep half's layers twice while learning instead of keeping their inner values:
    less memory, about a third more time."""
    deep_dropout: float = 0.0
    """Inside the deep half while it learns."""
    use_bfloat16: bool = True
    """The deep half learns in bfloat16; scores are float32 always."""
    input_scale: float = 1.0
    """Factor on table vectors before the deep half, per dimension; learned from there."""
    use_age: bool = True
    """Add an embedding of the age to each behaviour, let text evidence decay with it and attention
    see it. False: behaviours are known by their order alone; numbers of evidence keep recencies."""
    num_age_buckets: int = 16
    """Buckets of doubling length from an hour on; 16 reach 3.7 years."""
    output_width: int = 32
    """Q, width of a scene's and of an item's deep output."""
    use_exact_evidence: bool = True
    """How often, how regularly and how long ago the candidate itself is in the history, and to
    attention which behaviours are about it. Text evidence leaves these out in either case."""
    use_neighbor_evidence: bool = True
    """Which of the items that others take with the candidate are in the history."""
    use_text_evidence: bool = True
    """Cosines of the candidate's text with those of the history."""
    use_target_attention: bool = True
    """Attention of the candidate over the behaviours of the history."""
    attention_over: AttentionOver = "texts"
    """What target attention compares: the frozen vectors of the texts, or the deep half's
    ``states`` of the newest ``deep_length`` behaviours and of the candidate (the cosines of the
    texts stay as an offset). States are no features of the store: such a model is served as one
    program, its deep half runs in every request, and it has no deep outputs to export."""
    id_width: int | None = None
    """W, width of a learned vector per item of the training period: the candidate's, the mean of
    each scene's behaviours, their products and similarities go into the head. None = no ids."""
    text_length: int = 50
    """How many of the newest behaviours of a scene text evidence and attention over texts read."""
    num_kernels: int = 6
    """K, cosine kernels."""
    num_age_scales: int = 6
    """A, learned decay times of the evidence."""
    num_bins: int = 24
    """Quantile bins per numeric feature."""
    numeric_width: int = 8
    """Values per numeric feature after its encoding."""
    num_crosses: int = 2
    cross_rank: int = 48
    hidden: tuple[int, ...] = (256, 128)
    """Widths of the head's hidden layers."""
    num_members: int = 8
    """K perceptrons that share their hidden weights; the score is the mean of their logits."""
    dropout: float = 0.2
    """After each hidden layer of the head."""
    input_dropout: float = 0.0
    """On the head's input."""
    next_behavior_weight: float = 0.1
    """Of an auxiliary loss: from the deep outputs alone, tell the clicked item from all items of a
    batch. With several processes each sees the items of its own share."""

    @property
    def evidence_kinds(self) -> tuple[str, ...]:
        """Kinds of :mod:`encoders.evidence` that the model reads."""
        return evidence_kinds(self)

    @property
    def attends_states(self) -> bool:
        """Whether the head needs the deep half's states, not only its outputs."""
        return self.use_target_attention and self.attention_over == "states"

    def __post_init__(self) -> None:
        if not self.use_text and (
            self.use_deep_half
            or self.use_text_evidence
            or self.use_target_attention
            or self.next_behavior_weight
        ):
            raise ValueError(
                "use_text = False leaves nothing for use_deep_half, use_text_evidence, "
                "use_target_attention and next_behavior_weight: set them to False and 0, too"
            )
        _at_least(
            1,
            deep_length=self.deep_length,
            text_length=self.text_length,
            output_width=self.output_width,
            num_bins=self.num_bins,
            numeric_width=self.numeric_width,
            cross_rank=self.cross_rank,
            lora_rank=self.lora_rank,
            num_members=self.num_members,
        )
        _one_of(get_args(Position), position=self.position)
        _one_of(get_args(Pooling), pooling=self.pooling)
        _one_of(get_args(FineTune), fine_tune=self.fine_tune)
        _one_of(get_args(AttentionOver), attention_over=self.attention_over)
        _at_least(2, num_age_buckets=self.num_age_buckets, num_kernels=self.num_kernels)
        _at_least(0, num_crosses=self.num_crosses)
        if self.num_deep_layers is not None:
            _at_least(1, num_deep_layers=self.num_deep_layers)
        if self.id_width is not None:
            _at_least(1, id_width=self.id_width)
        if self.num_trained_layers is not None:
            self._check_trained_layers(self.num_trained_layers)
        if not 1 <= self.num_age_scales <= len(AGE_SCALES_DAYS):
            raise ValueError(
                f"num_age_scales must be in [1, {len(AGE_SCALES_DAYS)}], got {self.num_age_scales}"
            )
        if self.next_behavior_weight < 0:
            raise ValueError(
                f"next_behavior_weight must be at least 0, got {self.next_behavior_weight}"
            )
        if self.input_scale <= 0:
            raise ValueError(f"input_scale must be above 0, got {self.input_scale}")
        _share(
            deep_dropout=self.deep_dropout, dropout=self.dropout, input_dropout=self.input_dropout
        )

    def _check_trained_layers(self, number: int) -> None:
        if self.fine_tune == "frozen":
            raise ValueError(
                f"num_trained_layers is {number}, but with fine_tune 'frozen' none learns: set "
                "num_trained_layers to none, or fine_tune to 'full' or 'lora'"
            )
        _at_least(1, num_trained_layers=number)
        if self.num_deep_layers is not None and number > self.num_deep_layers:
            raise ValueError(
                f"num_trained_layers must be at most num_deep_layers ({self.num_deep_layers}), got "
                f"{number}"
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
class DinIdsConfig:
    """Target attention over learned vectors of item ids; no texts, no other features."""

    id_width: int = 32
    """Width of an item's vector."""
    attention_hidden: int = 32
    hidden: tuple[int, ...] = (128, 64)
    dropout: float = 0.1

    def __post_init__(self) -> None:
        _at_least(1, id_width=self.id_width, attention_hidden=self.attention_hidden)
        _share(dropout=self.dropout)


@dataclass(frozen=True)
class DcnConfig:
    """Crosses beside an MLP on all features and the item's id; nothing of the history itself."""

    id_width: int = 16
    """Width of an item's vector."""
    num_bins: int = 24
    """Quantile bins per numeric feature."""
    numeric_width: int = 8
    """Values per numeric feature after its encoding."""
    num_crosses: int = 3
    cross_rank: int = 48
    hidden: tuple[int, ...] = (256, 128)
    dropout: float = 0.2

    def __post_init__(self) -> None:
        _at_least(
            1,
            id_width=self.id_width,
            num_bins=self.num_bins,
            numeric_width=self.numeric_width,
            cross_rank=self.cross_rank,
        )
        _at_least(0, num_crosses=self.num_crosses)
        _share(dropout=self.dropout)


@dataclass(frozen=True)
class FullTextConfig:
    """A whole language model over the concatenated texts (:mod:`training.full_text`)."""

    num_tokens: int = 256
    """Tokens of the history that are read, the newest; at most the language model's window."""
    max_tokens_per_behavior: int = 32
    """Tokens kept of one text, its separator included."""
    deep_dropout: float = 0.0
    """Inside the language model while it learns."""
    use_bfloat16: bool = True
    """The language model learns in bfloat16; scores are float32 always."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more time."""
    use_numeric: bool = False
    """Give the head the numbers that Bahe's has: dense features, exact-id and neighbour evidence.
    Without, it sees the two texts alone."""
    num_bins: int = 24
    numeric_width: int = 8
    output_width: int = 32
    """Q, width of the history's and of an item's output."""
    num_crosses: int = 2
    cross_rank: int = 32
    hidden: tuple[int, ...] = (256, 128)
    dropout: float = 0.2
    input_dropout: float = 0.1

    def __post_init__(self) -> None:
        _at_least(
            2, num_tokens=self.num_tokens, max_tokens_per_behavior=self.max_tokens_per_behavior
        )
        _at_least(
            1,
            num_bins=self.num_bins,
            numeric_width=self.numeric_width,
            output_width=self.output_width,
            cross_rank=self.cross_rank,
        )
        _at_least(0, num_crosses=self.num_crosses)
        _share(
            deep_dropout=self.deep_dropout, dropout=self.dropout, input_dropout=self.input_dropout
        )


@dataclass(frozen=True)
class TreesConfig:
    """Gradient-boosted trees on dense features and evidence (:mod:`training.trees`)."""

    package: Literal["sklearn", "lightgbm"] = "sklearn"
    """LightGBM is an extra, and its wheel needs the system's libgomp."""
    num_trees: int = 1000
    """Grown at most; as many are kept as have the lowest logloss on the validation rows."""
    patience: int = 50
    """Trees without a lower one after which no more are grown."""
    learning_rate: float = 0.03
    num_leaves: int = 63
    max_depth: int = 12
    """Bounds the steps of a score."""
    min_rows_per_leaf: int = 200
    l2: float = 5.0
    feature_share: float = 0.5
    """Of the features, drawn for each split."""
    use_exact_evidence: bool = True
    use_neighbor_evidence: bool = True
    use_text_evidence: bool = True

    @property
    def evidence_kinds(self) -> tuple[str, ...]:
        """Kinds of :mod:`encoders.evidence` that the trees read."""
        return evidence_kinds(self)

    def __post_init__(self) -> None:
        _at_least(1, num_trees=self.num_trees, patience=self.patience, max_depth=self.max_depth)
        _at_least(2, num_leaves=self.num_leaves)
        if not 0 < self.feature_share <= 1:
            raise ValueError(f"feature_share must be in (0, 1], got {self.feature_share}")


@dataclass(frozen=True)
class EnsembleConfig:
    """Bahe and trees, the mean of their logits (:class:`training.trees.Ensemble`)."""

    bahe: BaheConfig = field(default_factory=BaheConfig)
    trees: TreesConfig = field(default_factory=TreesConfig)

    @property
    def evidence_kinds(self) -> tuple[str, ...]:
        """Kinds of :mod:`encoders.evidence` that either reads."""
        kinds = (*self.bahe.evidence_kinds, *self.trees.evidence_kinds)
        return tuple(dict.fromkeys(kinds))


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
    | DinIdsConfig
    | DcnConfig
    | FullTextConfig
    | ItemOnlyConfig
    | TreesConfig
    | EnsembleConfig
)
