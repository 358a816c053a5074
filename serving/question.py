"""What serving asks of a ranker, and a question that can be put to more than one of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from feature_repo.artifact import ArtifactManifest
from serving.answers import Explanation, HistoryChanges, Ranking, SimilarItem, UserView


class ServingRanker(Protocol):
    """What serving asks of a ranker (:class:`serving.ranker.Ranker`); safe for threads."""

    @property
    def manifest(self) -> ArtifactManifest:
        """Of the model."""

    @property
    def num_items(self) -> int:
        """Items that the store knows."""

    @property
    def items_at(self) -> datetime:
        """The moment that the items were read for, UTC."""

    def warm_up(self) -> None:
        """Read all items and rank once."""

    def check(self) -> None:
        """Make sure that the store answers."""

    def rank(
        self,
        user_id: str,
        *,
        candidates: Sequence[str] | None = None,
        top_k: int = 10,
        at: datetime | None = None,
        context: Mapping[str, float] | None = None,
        changes: HistoryChanges | None = None,
        num_history: int = 20,
        num_contributions: int = 0,
    ) -> Ranking:
        """Rank items for a user."""

    def user(self, user_id: str, *, at: datetime | None = None) -> UserView:
        """Tell what the online store knows of a user."""

    def explain(
        self,
        user_id: str,
        item_id: str,
        *,
        at: datetime | None = None,
        context: Mapping[str, float] | None = None,
        changes: HistoryChanges | None = None,
    ) -> Explanation:
        """Tell why an item has its score for a user."""

    def similar(self, item_id: str, *, top_k: int = 10) -> tuple[SimilarItem, ...]:
        """Find the items nearest to one."""


@dataclass(frozen=True)
class Question:
    """A ranking that is asked for.

    Args:
        user_id: For whom.
        candidates: Item ids to rank; None for the whole catalogue.
        top_k: Most items to return.
        context: What the request itself tells.
        changes: To the history, if it is one that might have been.
        num_contributions: Per item, how many of the texts that pulled it up or down to tell.
    """

    user_id: str
    candidates: Sequence[str] | None = None
    top_k: int = 10
    context: Mapping[str, float] = field(default_factory=dict)
    changes: HistoryChanges | None = None
    num_contributions: int = 0

    def put_to(self, ranker: ServingRanker, *, at: datetime | None = None) -> Ranking:
        """Ask a ranker; ``at`` is the moment of the request, None for now."""
        return ranker.rank(
            self.user_id,
            candidates=self.candidates,
            top_k=self.top_k,
            at=at,
            context=self.context,
            changes=self.changes,
            num_history=0,
            num_contributions=self.num_contributions,
        )
