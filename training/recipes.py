"""Every run that has a name: functions that return a full config.

The command line picks one and overrides a few fields; nothing else decides how a model is trained.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from training.config import (
    BaheConfig,
    DcnConfig,
    DinIdsConfig,
    DinTextConfig,
    EnsembleConfig,
    FullTextConfig,
    ItemOnlyConfig,
    MeanPoolingConfig,
    ModelConfig,
    PopularityConfig,
    RepeatCountConfig,
    TreesConfig,
)


@dataclass(frozen=True)
class TrainingConfig:
    """How weights are learned; for models that have none, ``epochs`` is 0."""

    epochs: int = 3
    batch_contexts: int = 64
    """Contexts per pass; one history serves all candidates of its context."""
    accumulate_batches: int = 1
    """Passes per step of the optimiser: memory of one, gradient of all, as of one larger batch.
    Only :class:`training.layers.RunningNorm` sees the passes: it takes each into its statistics by
    itself."""
    max_candidates: int = 64
    """Contexts with more candidates are cut into several."""
    learning_rate: float = 1e-3
    """Highest, of everything but the deep half."""
    deep_learning_rate: float = 5e-5
    """Highest, of the deep half's pretrained weights."""
    weight_decay: float = 0.02
    warmup_steps: int = 60
    """Steps of linear warm-up before the cosine; at most a tenth of all steps."""
    clip_norm: float = 2.0
    """Largest norm of the gradient."""
    average_decay: float | None = 0.995
    """Per step, of the weights' moving average that is validated and kept; None = no average."""
    validations_per_epoch: int = 1
    patience: int | None = None
    """Validations without a better AUC after which a run ends early; None = never."""
    checkpoint_every_steps: int = 200
    """A killed run loses at most so many steps; each validation writes a checkpoint, too."""
    seed: int = 0
    extra_requests: bool = True
    """Learn from the requests that ingest sampled beside the given ones, too, where there are some
    (``negatives.extra_train`` of the data set)."""
    context_share: float = 1.0
    """Of the training contexts, drawn with the seed, for an answer in less time; all validation and
    test rows are still scored."""
    deterministic: bool = False
    """Refuse operations that give other results when they are repeated; CPUs have none here."""
    compiled: bool = False
    """Let torch.compile fuse the model while it learns; needs a C++ compiler on CPUs."""

    def __post_init__(self) -> None:
        for name in (
            "batch_contexts",
            "accumulate_batches",
            "max_candidates",
            "validations_per_epoch",
            "checkpoint_every_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1 or None, got {self.patience}")
        for name in ("epochs", "warmup_steps", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("learning_rate", "deep_learning_rate", "clip_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if self.average_decay is not None and not 0 < self.average_decay < 1:
            raise ValueError(f"average_decay must be in (0, 1), got {self.average_decay}")
        if not 0 < self.context_share <= 1:
            raise ValueError(f"context_share must be in (0, 1], got {self.context_share}")


@dataclass(frozen=True)
class Recipe:
    """Everything that a run is made from, besides the data."""

    name: str
    model: ModelConfig
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sequence_length: int = 50
    """M, behaviours per scene that the model reads; evidence comes from all that are kept."""
    baseline: bool = False
    """A model to compare with; training it does not make it the one that is served."""

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise ValueError(f"sequence_length must be at least 1, got {self.sequence_length}")


def bahe_small() -> Recipe:
    """For a first run: one deep layer over the last 20 behaviours, one pass over the data."""
    return Recipe(
        name="bahe_small",
        model=BaheConfig(num_deep_layers=1, deep_length=20),
        training=TrainingConfig(epochs=1),
    )


def bahe_fast() -> Recipe:
    """For cheap serving: late fusion alone, a small head, one pass.

    What the candidate has to do with single behaviours comes in through the evidence, which is a
    few numbers per candidate; the head reads them and the deep outputs. It costs a tenth of
    ``bahe_base``'s per candidate.
    """
    return Recipe(
        name="bahe_fast",
        model=BaheConfig(
            num_deep_layers=1,
            deep_length=20,
            use_target_attention=False,
            use_text_evidence=False,
            numeric_width=4,
            num_crosses=1,
            cross_rank=16,
            hidden=(128, 64),
            num_members=1,
        ),
        training=TrainingConfig(epochs=1),
    )


def bahe_base() -> Recipe:
    """The whole model, two passes: a third one overfits on Online Retail II (docs/log.md)."""
    return Recipe(
        name="bahe_base",
        model=BaheConfig(num_deep_layers=1, deep_length=20),
        training=TrainingConfig(epochs=2, validations_per_epoch=2),
    )


def bahe_large() -> Recipe:
    """All deep layers over the last 100 behaviours, a wider head; for more data."""
    return Recipe(
        name="bahe_large",
        model=BaheConfig(
            deep_length=100, text_length=100, output_width=64, hidden=(384, 192), dropout=0.25
        ),
        training=TrainingConfig(epochs=2, validations_per_epoch=4),
        sequence_length=100,
    )


def popularity() -> Recipe:
    """Events of the item in the last 90 days; nothing is learned but the scale."""
    return Recipe(
        name="popularity",
        model=PopularityConfig(),
        training=TrainingConfig(epochs=0),
        sequence_length=1,
        baseline=True,
    )


def repeat_count() -> Recipe:
    """How often the candidate is in the kept history, then popularity."""
    return Recipe(
        name="repeat_count",
        model=RepeatCountConfig(),
        training=TrainingConfig(epochs=0),
        baseline=True,
    )


def mean_pooling() -> Recipe:
    """Mean of the last 50 text vectors against the candidate's."""
    return Recipe(
        name="mean_pooling",
        model=MeanPoolingConfig(),
        training=TrainingConfig(epochs=2),
        sequence_length=50,
        baseline=True,
    )


def din_text() -> Recipe:
    """Target attention over the last 50 text vectors."""
    return Recipe(
        name="din_text",
        model=DinTextConfig(),
        training=TrainingConfig(epochs=2),
        sequence_length=50,
        baseline=True,
    )


def din_ids() -> Recipe:
    """Target attention over learned vectors of the last 50 item ids."""
    return Recipe(
        name="din_ids",
        model=DinIdsConfig(),
        training=TrainingConfig(epochs=2),
        sequence_length=50,
        baseline=True,
    )


def dcn_v2() -> Recipe:
    """Crosses beside an MLP on all dense features and the item's id, without the sequence."""
    return Recipe(
        name="dcn_v2",
        model=DcnConfig(),
        training=TrainingConfig(epochs=2),
        sequence_length=1,
        baseline=True,
    )


def full_text() -> Recipe:
    """The whole language model over the last 256 tokens of the history, trained end to end."""
    return Recipe(
        name="full_text",
        model=FullTextConfig(),
        training=TrainingConfig(epochs=1, batch_contexts=16, deep_learning_rate=5e-5),
        sequence_length=128,  # 256 tokens hold no more: a text has one token and a separator
        baseline=True,
    )


def trees() -> Recipe:
    """Gradient-boosted trees (scikit-learn's) on every number: the baseline to beat."""
    return Recipe(
        name="trees",
        model=TreesConfig(),
        training=TrainingConfig(epochs=0),
        sequence_length=1,
        baseline=True,
    )


def bahe_with_trees() -> Recipe:
    """The base model and trees, the mean of their logits."""
    base = bahe_base()
    assert isinstance(base.model, BaheConfig)
    return replace(base, name="bahe_with_trees", model=EnsembleConfig(bahe=base.model))


def trees_lightgbm() -> Recipe:
    """The same by LightGBM; needs the extra ``lightgbm``."""
    return replace(trees(), name="trees_lightgbm", model=TreesConfig(package="lightgbm"))


def item_only() -> Recipe:
    """Item features alone: what a sampler of negatives leaks."""
    return Recipe(
        name="item_only",
        model=ItemOnlyConfig(),
        training=TrainingConfig(epochs=2),
        sequence_length=1,
        baseline=True,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        bahe_small,
        bahe_fast,
        bahe_base,
        bahe_large,
        bahe_with_trees,
        popularity,
        repeat_count,
        mean_pooling,
        din_text,
        trees,
        trees_lightgbm,
        din_ids,
        dcn_v2,
        full_text,
        item_only,
    )
}
