"""What is kept of learning that is not finished, and after which steps what is done."""

from encoders.checkpoint import SavedState
from encoders.lm.recipes import LearningConfig
from feature_repo.manifest import Document


class RunManifest(Document):
    """What every model that was learned tells of itself."""

    fingerprint: str
    """Of all that decides the weights."""


class CurvePoint(Document):
    """Loss of the steps since the point before."""

    step: int
    loss: float
    """Mean, in nats per token."""


class Validation(Document):
    """Figures of the weights after a step."""

    step: int
    figures: dict[str, float]


class LearningState(SavedState):
    """What is kept of learning that is not finished, beside weights and the optimiser's moments."""

    num_steps: int
    """Of the whole run; fixed at its beginning."""
    step: int
    """Steps done."""
    num_tokens: int
    """Learned from."""
    seconds: float
    """Spent in steps, by all processes that were at it in turn."""
    recent: list[float]
    """Losses of the last steps, spikes left out."""
    skipped: list[int]
    """Steps left out for their loss leapt, from 0."""
    since_point: list[float]
    """Losses since the curve's last point."""
    curve: list[CurvePoint]
    validations: list[Validation]


def snapshot_steps(num_steps: int, config: LearningConfig) -> set[int]:
    """After which steps weights are kept for averaging; the last step is one of them."""
    return _evenly(config.num_snapshots, config.snapshot_share, num_steps)


def validation_steps(num_steps: int, config: LearningConfig) -> set[int]:
    """After which steps the weights are measured; the last step is one of them."""
    return _evenly(config.num_validations, 1.0, num_steps)


def _evenly(number: int, share: float, num_steps: int) -> set[int]:
    """So many steps, evenly over the last ``share`` of a run, the last one among them."""
    first = num_steps * (1 - share)
    steps = {round(first + (num_steps - first) * (i + 1) / number) for i in range(number)}
    return {step for step in steps if step > 0}
