"""Figures of contenders that take turns.

Of two turns of the same round, so that noise of a shared machine hits both.
"""

from collections.abc import Mapping, Sequence
from statistics import median


def ratio(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """How many times the second the first is, turn by turn.

    Args:
        first: One figure per round.
        second: The other's, of the same rounds.

    Returns:
        ``median``, ``lowest`` and ``highest`` ratio of a round.
    """
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    return {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def shown(of_turns: Mapping[str, float] | None, *, digits: int = 2) -> str:
    """``1.37 [1.30, 1.44]``; ``-`` where there is none.

    Args:
        of_turns: Of :func:`ratio`.
        digits: After the point.
    """
    if of_turns is None:
        return "-"
    middle, low, high = (f"{of_turns[key]:.{digits}f}" for key in ("median", "lowest", "highest"))
    return f"{middle} [{low}, {high}]"
