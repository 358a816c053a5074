"""A ranker that answers at once: for tests of what is around it."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from feature_repo.artifact import ArtifactManifest
from serving.answers import (
    Contribution,
    Explanation,
    HistoryChanges,
    RankedItem,
    Ranking,
    SimilarItem,
    UnknownItemError,
    UserView,
)
from serving.app import AppSettings, create_app
from serving.deployment import Deployment
from serving.directory import NameTable
from serving.event_rules import LiveEvent
from serving.events import EventReceipt
from serving.history import Behavior
from tests.serving.conftest import ITEMS, NOW, USERS, ToyItem, toy_catalog, toy_manifest

HISTORY = (
    Behavior("red lamp", scene="purchase", time=NOW - timedelta(days=12), item_id="L1"),
    Behavior(text="looking for a lamp", scene="search", time=NOW - timedelta(days=20)),
)
AGE_S = 12 * 86_400.0
CONTRIBUTIONS = tuple(Contribution(HISTORY[0], count=2, logits=1.5 - n) for n in range(7))


class StandIn:
    """Knows ann and the toy shop's items; scores fall by a tenth from item to item.

    Args:
        run: Its name.
        before: Called before each reading of a user, and may raise or wait.
        manifest: Changes to the toy manifest.
    """

    def __init__(
        self, run: str = "toy-run", *, before: Callable[[], None] = lambda: None, **manifest: Any
    ) -> None:
        self.manifest: ArtifactManifest = toy_manifest(run=run, **manifest)
        self.num_items = len(ITEMS)
        self.items_at = NOW
        self.before = before
        self.asked: list[dict[str, Any]] = []
        self.is_warm = False

    def warm_up(self) -> None:
        self.is_warm = True

    def check(self) -> None:
        self.before()

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
        self.asked.append({"at": at, "context": context, "changes": changes})
        self.before()
        known = user_id == "ann"
        wanted = list(ITEMS) if candidates is None else list(dict.fromkeys(candidates))
        scored = [item_id for item_id in wanted if item_id in ITEMS]
        return Ranking(
            user_id=user_id,
            known=known,
            model=self.manifest.run,
            at=at or NOW,
            history=HISTORY[:num_history] if known else (),
            ranked=tuple(
                RankedItem(
                    item_id,
                    ITEMS[item_id].text,
                    0.9 - place / 10,
                    "popular now",
                    CONTRIBUTIONS[:num_contributions],
                )
                for place, item_id in enumerate(scored[:top_k])
            ),
            unknown_items=tuple(item_id for item_id in wanted if item_id not in ITEMS),
            num_scored=len(scored),
            notes=() if known else ("unknown user",),
            path="cached" if known else "live",
            degraded=() if known else ("store away: nothing was read",),
            seconds={"read": 0.001, "model": 0.004},
            feature_age_s=AGE_S if known else None,
            missing_rate=0.25 if known else None,
        )

    def user(self, user_id: str, *, at: datetime | None = None) -> UserView:
        self.before()
        known = user_id == "ann"
        return UserView(
            known=known,
            at=at or NOW,
            history=HISTORY if known else (),
            totals={"purchase": 2, "search": 1} if known else {"purchase": 0, "search": 0},
            dense={"activity": 0.5 if known else float("nan")},
            feature_age_s=AGE_S if known else None,
        )

    def explain(
        self,
        user_id: str,
        item_id: str,
        *,
        at: datetime | None = None,
        context: Mapping[str, float] | None = None,
        changes: HistoryChanges | None = None,
    ) -> Explanation:
        if item_id not in ITEMS:
            raise UnknownItemError(f"no item {item_id!r}")
        return Explanation(
            user_id=user_id,
            item_id=item_id,
            text=ITEMS[item_id].text,
            model=self.manifest.run,
            at=at or NOW,
            score=0.5,
            score_without_history=0.25,
            contributions=CONTRIBUTIONS,
            reason="popular now",
        )

    def similar(self, item_id: str, *, top_k: int = 10) -> tuple[SimilarItem, ...]:
        if item_id not in ITEMS:
            raise UnknownItemError(f"no item {item_id!r}")
        near = [SimilarItem(other, ITEMS[other].text, 0.5) for other in ITEMS if other != item_id]
        return tuple(near[:top_k])


class EventList:
    """Takes events into a list: an id that it has is a duplicate, scene "never" is rejected."""

    def __init__(self) -> None:
        self.events: dict[str, LiveEvent] = {}
        self._lock = threading.Lock()

    def accept(self, events: Sequence[LiveEvent]) -> EventReceipt:
        new, rejected = [], []
        with self._lock:
            for place, event in enumerate(events):
                if event.scene == "never":
                    rejected.append((place, "there is no such scene; expected purchase, search"))
                elif event.event_id not in self.events:
                    new.append(event)
            self.events |= {event.event_id: event for event in new}
        duplicates = len(events) - len(new) - len(rejected)
        return EventReceipt(len(new), duplicates, tuple(rejected))


def toy_directory(items: Mapping[str, ToyItem] = ITEMS) -> NameTable:
    """The toy shop's users, those with the most behaviours first, and its items."""
    num_behaviors = {user_id: len(user.events) for user_id, user in USERS.items()}
    return NameTable.of(num_behaviors, toy_catalog(items))


def stand_in_app(ranker: StandIn | None = None, **settings: Any) -> FastAPI:
    """The application over a stand-in; ``settings`` are those of :class:`AppSettings`."""
    return create_app(
        Deployment(ranker or StandIn()),
        directory=toy_directory(),
        events=EventList(),
        settings=AppSettings(**settings),
    )


def client_of(app: FastAPI) -> TestClient:
    """Asks an application; what it raises is an answer as well."""
    return TestClient(app, raise_server_exceptions=False)


def strict(text: str) -> Any:
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(name: str) -> None:
        pytest.fail(f"{name} in {text}")

    return json.loads(text, parse_constant=refuse)
