"""What a model reads, by name and width: fixed at training time, checked ever after."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from feature_repo.artifact import ArtifactManifest
from feature_repo.errors import ArtifactError


@dataclass(frozen=True)
class InputSchema:
    """Names and widths of the program's inputs (:data:`feature_repo.artifact.PROGRAM_INPUTS`)."""

    scenes: tuple[str, ...]
    """S, in the order of the per-scene arrays."""
    sequence_length: int
    """M, behaviours per scene."""
    vector_width: int
    """D, width of the table's vectors."""
    user_dense_names: tuple[str, ...]
    """Fu."""
    item_dense_names: tuple[str, ...]
    """Fi."""
    context_names: tuple[str, ...]
    """Fx."""
    evidence_names: tuple[str, ...]
    """E."""
    category_vocabularies: dict[str, tuple[str, ...]]
    """K columns -> values; value i has index i + 1."""

    def __post_init__(self) -> None:
        if not self.scenes:
            raise ValueError("a model needs at least one scene")
        if self.sequence_length < 1:
            raise ValueError(f"sequence_length must be at least 1, got {self.sequence_length}")

    def evidence_columns(self, kinds: Sequence[str]) -> list[int]:
        """Places of the evidence of some kinds (:data:`encoders.evidence.KINDS`)."""
        return [i for i, n in enumerate(self.evidence_names) if n.split("_")[0] in kinds]

    @classmethod
    def of(cls, manifest: ArtifactManifest) -> Self:
        """What the model of an artifact reads."""
        return cls(
            scenes=manifest.scenes,
            sequence_length=manifest.sequence_length,
            vector_width=manifest.encoder_width,
            user_dense_names=manifest.user_dense_names,
            item_dense_names=manifest.item_dense_names,
            context_names=manifest.context_names,
            evidence_names=manifest.evidence_names,
            category_vocabularies=manifest.category_vocabularies,
        )


def select_columns(
    values: NDArray[np.float32], names: Sequence[str], wanted: Sequence[str], *, what: str
) -> NDArray[np.float32]:
    """The columns ``wanted`` of ``values``, in that order.

    Args:
        values: float32 [R, F].
        names: The F names.
        wanted: Names to take.
        what: Whose features these are, for the error.

    Raises:
        ArtifactError: If a wanted column is not there.
    """
    if tuple(names) == tuple(wanted):
        return values
    position = {name: index for index, name in enumerate(names)}
    missing = [name for name in wanted if name not in position]
    if missing:
        raise ArtifactError(
            f"the feature store has no {what} feature {missing[0]!r}, which the model was trained "
            "on: train a new model with `longtrail train`"
        )
    return values[:, [position[name] for name in wanted]]
