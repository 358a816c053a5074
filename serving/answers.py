"""What serving answers: a ranking, and what is known of a user."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from feature_repo.artifact import ArtifactManifest
from feature_repo.errors import LongtrailError
from feature_repo.features import UserFeatures
from serving.history import Behavior
from serving.items import ItemSnapshot


class UnknownItemError(LongtrailError):
    """An item that the feature store does not know was asked for by its id."""


class UnusableChangeError(LongtrailError):
    """A change that a user's history cannot have.

    Args:
        reason: A sentence; nothing of what came is repeated.
        place: Where among the changes, such as ``("removed", 0)``.
    """

    def __init__(self, reason: str, *, place: tuple[str | int, ...]) -> None:
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
        super().__init__(f"changes{path}: {reason}")
        self.reason = reason
        self.place = place


UserPath = Literal["cached", "live", "whole"]
"""Where the user's deep outputs came from: the feature, the deep half just now, or neither: the
whole program ran, because the model has no parts."""


@dataclass(frozen=True)
class AddedBehavior:
    """A behaviour that the user did not have.

    Args:
        scene: One of the model's.
        text: As in the data; the item's title where None.
        item_id: What it is about, if anything.
    """

    scene: str
    text: str | None = None
    item_id: str | None = None


@dataclass(frozen=True)
class HistoryChanges:
    """A history that might have been: for "what if" questions, nothing is stored.

    Args:
        removed: Places in :attr:`Ranking.history` (newest first, 0 = newest) that are left out.
        added: Behaviours of just now, oldest first.
    """

    removed: tuple[int, ...] = ()
    added: tuple[AddedBehavior, ...] = ()


@dataclass(frozen=True)
class Served:
    """What a ranking was computed from, for the log of served features; never sent.

    Args:
        manifest: Of the model: what the columns of ``items`` are called.
        users: The one user, as read.
        items: The items that were scored, and the moment they were read for.
        logits: float32 [T], in the order of ``items``; calibrated.
    """

    manifest: ArtifactManifest
    users: UserFeatures
    items: ItemSnapshot
    logits: NDArray[np.float32]


@dataclass(frozen=True)
class Contribution:
    """What behaviours of one text and scene add to a score.

    Args:
        behavior: The newest of them.
        count: How many there are.
        logits: Of the score; above 0 where they speak for the item.
    """

    behavior: Behavior
    count: int
    logits: float


@dataclass(frozen=True)
class RankedItem:
    """An item in the answer."""

    item_id: str
    text: str
    score: float
    """Probability of a click, in [0, 1]."""
    reason: str
    contributions: tuple[Contribution, ...] = ()
    """The strongest first, where they were asked for."""


@dataclass(frozen=True)
class Ranking:
    """The answer for one user at one moment.

    Args:
        user_id: As asked.
        known: The store knows the user; if not, the model ranked an empty history.
        model: Name of the run.
        at: The moment the user was read for, UTC.
        history: The newest kept behaviours, as many as were asked for, newest first.
        ranked: Best first; of equal scores, the smaller item id first.
        unknown_items: Candidates that the store does not know, in the order asked; not ranked.
        num_scored: Items that the model scored.
        notes: Sentences on what is unusual about this answer.
        path: Where the user's deep outputs came from.
        degraded: Why this answer is worse than it could be, one sentence each; empty as a rule.
        seconds: Stage ("read", "features", "model", "explain") -> time that it took.
        feature_age_s: Seconds since the user's newest behaviour; None without one.
        missing_rate: Share of the user's dense features that were missing; None without any.
        served: What it was computed from.
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
    path: UserPath = "whole"
    degraded: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict, compare=False)
    feature_age_s: float | None = None
    missing_rate: float | None = None
    served: Served | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class SimilarItem:
    """An item whose vector lies near another's."""

    item_id: str
    text: str
    similarity: float
    """Cosine, in [-1, 1]."""


@dataclass(frozen=True)
class Explanation:
    """Why an item has its score for a user: by leaving behaviours out.

    Args:
        user_id: As asked.
        item_id: As asked.
        text: The item's title.
        model: Name of the run.
        at: The moment the user was read for, UTC.
        score: Probability of a click.
        score_without_history: The same for an empty history.
        contributions: The strongest first.
        reason: Evidence in words, as in a ranking.
    """

    user_id: str
    item_id: str
    text: str
    model: str
    at: datetime
    score: float
    score_without_history: float
    contributions: tuple[Contribution, ...]
    reason: str


@dataclass(frozen=True)
class UserView:
    """What the online store knows of a user, for people.

    Args:
        known: The store knows the user.
        at: The moment the user was read for, UTC.
        history: All kept behaviours, newest first.
        totals: Scene -> behaviours of all time.
        dense: Name -> value; NaN where missing or expired.
        feature_age_s: Seconds since the newest behaviour; None without one.
    """

    known: bool
    at: datetime
    history: tuple[Behavior, ...]
    totals: dict[str, int]
    dense: dict[str, float]
    feature_age_s: float | None = None
