"""Contributions of a history to scores, with the behaviours named."""

from collections.abc import Mapping, Sequence

from encoders.attribution import Attribution
from serving.answers import Contribution
from serving.history import Behavior


def contributions_of(
    found: Attribution,
    item: int,
    number: int,
    scenes: Sequence[str],
    behaviors: Mapping[tuple[str, int], Behavior],
) -> tuple[Contribution, ...]:
    """The strongest contributions to one item's score.

    Args:
        found: Of several items.
        item: Which of them.
        number: At most.
        scenes: The scenes that ``found`` counts.
        behaviors: Scene and place in its sequence -> the behaviour.
    """
    return tuple(
        Contribution(
            behavior=behaviors[scenes[found.scene_index[group]], int(found.position[group])],
            count=int(found.count[group]),
            logits=float(found.contributions[group, item]),
        )
        for group in found.strongest(number, item)
    )
