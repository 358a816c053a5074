"""What serving answers: a ranking, and what is known of a user."""

from dataclasses import dataclass
from datetime import datetime

from serving.history import Behavior


@dataclass(frozen=True)
class RankedItem:
    """An item in the answer."""

    item_id: str
    text: str
    score: float
    """Probability of a click, in [0, 1]."""
    reason: str


@dataclass(frozen=True)
class Ranking:
    """The answer for one user at one moment.

    Args:
        user_id: As asked.
        known: The store knows the user; if not, the model ranked an empty history.
        model: Name of the run.
        at: The moment the user was read for, UTC.
        history: All kept behaviours, newest first.
        ranked: Best first; of equal scores, the smaller item id first.
        unknown_items: Candidates that the store does not know, in the order asked; not ranked.
        num_scored: Items that the model scored.
        notes: Sentences on what is unusual about this answer.
    """

    user_id: str
    known: bool
    model: str
    at: datetime
    history: tuple[Behavior, ...]
    ranked: tuple[RankedItem, ...]
    unknown_items: tuple[str, ...]
    num_scored: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class UserView:
    """What the online store knows of a user, for people.

    Args:
        known: The store knows the user.
        at: The moment the user was read for, UTC.
        history: All kept behaviours, newest first.
        totals: Scene -> behaviours of all time.
        dense: Name -> value; NaN where missing or expired.
    """

    known: bool
    at: datetime
    history: tuple[Behavior, ...]
    totals: dict[str, int]
    dense: dict[str, float]
