"""What the HTTP interface gives, as OpenAPI describes it; :mod:`serving.rendering` builds it."""

from datetime import datetime
from typing import Any

from pydantic import Field

from serving.answers import UserPath
from serving.schemas import Body, examples

MAX_CONTRIBUTIONS = 5
"""Of a ranked item, the strongest; `/v1/explain` gives all that were left out."""


class BehaviorEntry(Body):
    """One behaviour of a user."""

    text: str
    scene: str
    time: datetime = Field(description="UTC")
    item_id: str | None = Field(None, description="What it is about, if anything")


class ContributionEntry(Body):
    """What behaviours of one text and scene add to a score."""

    text: str
    scene: str
    time: datetime = Field(description="Of the newest of them, UTC")
    count: int = Field(description="How many there are")
    logits: float = Field(description="Above 0 where they speak for the item")


class RankedEntry(Body):
    """An item in the answer."""

    item_id: str
    text: str = Field(description="The item's title; empty where none is known")
    score: float = Field(ge=0, le=1, description="Probability of a click")
    reason: str = Field(description="Evidence from the user's own history, in words")
    contributions: list[ContributionEntry] | None = Field(
        None, description=f"The {MAX_CONTRIBUTIONS} strongest; only with `explain`"
    )


_REQUEST_ID = "0b1f6e0c52d64c0f9d7d8f5c3a0e4b21"
_RANKED = {
    "request_id": _REQUEST_ID,
    "user_id": "14911",
    "known": True,
    "model": "bahe_small-20261121-101500",
    "at": "2011-12-09T12:50:00.000001Z",
    "path": "cached",
    "ranked": [
        {
            "item_id": "85123A",
            "text": "white hanging heart t-light holder",
            "score": 0.41,
            "reason": "purchase before: 3 times, last 12 days ago",
        }
    ],
    "unknown_items": ["22423"],
    "notes": ["1 unknown item left out"],
    "degraded": [],
}


class RankResponse(Body):
    """Items, best first."""

    model_config = examples(_RANKED)

    request_id: str = Field(
        description="Of this answer: clicks name it. Alone it is the X-Request-ID, in a batch "
        "`/` and the place follow"
    )
    user_id: str
    known: bool = Field(description="Whether the feature store knows the user")
    model: str = Field(description="Name of the run")
    at: datetime = Field(description="The moment that the user was read for, UTC")
    path: UserPath = Field(
        description="Where the user's deep outputs came from: the feature, the deep half just now, "
        "or the whole model in one"
    )
    ranked: list[RankedEntry]
    unknown_items: list[str] = Field(description="Candidates that the feature store does not know")
    notes: list[str] = Field(description="What is unusual about this answer")
    degraded: list[str] = Field(description="Why this answer is worse than it could be")


class BatchFailure(Body):
    """A request of a batch that could not be answered."""

    error: str


class BatchResponse(Body):
    """One result per request, in their order."""

    model_config = examples(
        {
            "results": [
                {**_RANKED, "request_id": f"{_REQUEST_ID}/0"},
                {"error": "the store is away: start it"},
            ]
        }
    )

    results: list[RankResponse | BatchFailure]


class ExplainResponse(Body):
    """Why an item has its score, by leaving behaviours out."""

    model_config = examples(
        {
            "user_id": "14911",
            "item_id": "85123A",
            "text": "white hanging heart t-light holder",
            "model": "bahe_small-20261121-101500",
            "at": "2011-12-09T12:50:00.000001Z",
            "score": 0.41,
            "score_without_history": 0.08,
            "contributions": [
                {
                    "text": "white hanging heart t-light holder",
                    "scene": "purchase",
                    "time": "2011-11-27T10:02:00Z",
                    "count": 3,
                    "logits": 1.9,
                }
            ],
            "reason": "purchase before: 3 times, last 12 days ago",
        }
    )

    user_id: str
    item_id: str
    text: str = Field(description="The item's title; empty where none is known")
    model: str = Field(description="Name of the run")
    at: datetime = Field(description="The moment that the user was read for, UTC")
    score: float = Field(ge=0, le=1, description="Probability of a click")
    score_without_history: float = Field(ge=0, le=1, description="The same for an empty history")
    contributions: list[ContributionEntry] = Field(description="The strongest first")
    reason: str


class UserResponse(Body):
    """What the online store knows of a user now."""

    model_config = examples(
        {
            "user_id": "14911",
            "known": True,
            "at": "2011-12-09T12:50:00.000001Z",
            "history": [
                {
                    "text": "white hanging heart t-light holder",
                    "scene": "purchase",
                    "time": "2011-11-27T10:02:00Z",
                    "item_id": "85123A",
                }
            ],
            "totals": {"purchase": 5677},
            "features": {"purchase_count_30d": 312.0, "purchase_days_since_last": None},
            "feature_age_s": 1046880.0,
        }
    )

    user_id: str
    known: bool = Field(description="Whether the feature store knows the user")
    at: datetime = Field(description="The moment that ages refer to, UTC")
    history: list[BehaviorEntry] = Field(description="The kept behaviours, newest first")
    totals: dict[str, int] = Field(description="Scene -> behaviours of all time")
    features: dict[str, float | None] = Field(description="By name; null where missing or expired")
    feature_age_s: float | None = Field(description="Seconds since the newest behaviour")


class FoundUsers(Body):
    """Users of the data set, those with the most behaviours first."""

    model_config = examples({"users": ["14911", "14646"]})

    users: list[str]


class ItemEntry(Body):
    """An item of the data set."""

    model_config = examples({"item_id": "85123A", "text": "white hanging heart t-light holder"})

    item_id: str
    text: str = Field(description="Its latest title; empty where none is known")


class FoundItems(Body):
    """Items whose titles fit."""

    items: list[ItemEntry]


class SimilarEntry(Body):
    """An item whose vector lies near another's."""

    item_id: str
    text: str
    similarity: float = Field(description="Cosine, in [-1, 1]")


class SimilarResponse(Body):
    """Items near one, the nearest first."""

    model_config = examples(
        {
            "item_id": "85123A",
            "similar": [{"item_id": "21733", "text": "red hanging heart", "similarity": 0.93}],
        }
    )

    item_id: str
    similar: list[SimilarEntry]


class RejectedEvent(Body):
    """An event that was not taken."""

    index: int = Field(description="Its place in the request, from 0")
    reason: str


class EventsResponse(Body):
    """What became of posted events: the accepted ones are durable and in the online store."""

    model_config = examples(
        {"accepted": 2, "duplicates": 1, "rejected": [{"index": 3, "reason": "no such scene"}]}
    )

    accepted: int
    duplicates: int = Field(description="Events that were accepted before; nothing changed")
    rejected: list[RejectedEvent]


class ModelResponse(Body):
    """The model card."""

    run: str
    recipe: str
    dataset: str
    encoder_fingerprint: str
    created: datetime
    train_start: datetime = Field(description="First training impression, UTC")
    train_end: datetime = Field(description="Last training impression, UTC")
    scenes: list[str]
    sequence_length: int = Field(description="Behaviours per scene that the model itself reads")
    context_names: list[str] = Field(description="What `context` may name")
    metrics: dict[str, dict[str, Any]] = Field(description="Split -> metric -> value")
    calibration: str | None = Field(description="How logits were calibrated; null: not at all")
    num_items: int = Field(description="Items that the store knows")
    items_at: datetime = Field(description="The moment that the items were read for, UTC")
    shadow: str | None = Field(description="The run that ranks in the shadow, if any")


class HealthResponse(Body):
    """The process lives."""

    model_config = examples({"status": "ok"})

    status: str = Field(description="`ok`")


class ReadyResponse(Body):
    """Whether requests can be answered."""

    model_config = examples({"ready": True, "run": "bahe_small-20261121-101500", "notes": []})

    ready: bool
    run: str | None = Field(description="That serves; null while none could be loaded yet")
    notes: list[str] = Field(description="What an operator should look at; it serves all the same")
    detail: str | None = Field(None, description="Why it is not ready")


class Problem(Body):
    """One thing that is wrong with a request."""

    loc: list[str | int] = Field(description="Where: `body`, then the names of the fields")
    msg: str
    type: str


class Invalid(Body):
    """A malformed request."""

    detail: list[Problem]


class Failure(Body):
    """A request that could not be answered."""

    detail: str
