"""What the HTTP interface takes and gives, with the limits that it promises."""

from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints

MAX_CANDIDATES = 1000
MAX_TOP_K = 1000
MAX_ID_LENGTH = 256
MAX_CONTEXT = 100

Identifier = Annotated[
    str,
    # No control characters: an id of the data set's own never has them, and logs stay readable.
    StringConstraints(
        strict=True, min_length=1, max_length=MAX_ID_LENGTH, pattern=r"^[^\x00-\x1f\x7f]+$"
    ),
]
StrictNumber = Annotated[FiniteFloat, Field(strict=True)]


class Body(BaseModel):
    """Every body: unknown fields are refused, NaN and infinity never pass."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RankRequest(Body):
    """Whom to rank for, and what."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"user_id": "14911", "top_k": 5},
                {"user_id": "14911", "candidates": ["85123A", "22423"], "top_k": 2},
            ]
        }
    )

    user_id: Identifier
    candidates: (
        Annotated[list[Identifier], Field(min_length=1, max_length=MAX_CANDIDATES)] | None
    ) = Field(None, description="Item ids to rank; left out: the whole catalogue")
    top_k: Annotated[int, Field(strict=True, ge=1, le=MAX_TOP_K)] = Field(
        10, description="Most items to return"
    )
    context: Annotated[dict[str, StrictNumber], Field(max_length=MAX_CONTEXT)] = Field(
        default_factory=dict,
        description="What the request itself tells, by the names that the model was trained with",
    )


class RankedEntry(Body):
    """An item in the answer."""

    item_id: str
    text: str = Field(description="The item's title; empty where none is known")
    score: float = Field(ge=0, le=1, description="Probability of a click")
    reason: str = Field(description="Evidence from the user's own history, in words")


class RankResponse(Body):
    """Items, best first."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "user_id": "14911",
                    "known": True,
                    "model": "bahe_small-20261121-101500",
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
                }
            ]
        }
    )

    user_id: str
    known: bool = Field(description="Whether the feature store knows the user")
    model: str = Field(description="Name of the run")
    ranked: list[RankedEntry]
    unknown_items: list[str] = Field(description="Candidates that the feature store does not know")
    notes: list[str] = Field(description="What is unusual about this answer")


class BehaviorEntry(Body):
    """One behaviour of a user."""

    text: str
    time: datetime = Field(description="UTC")


class SceneHistory(Body):
    """A user's behaviours of one scene."""

    total: int = Field(description="Behaviours of all time")
    behaviors: list[BehaviorEntry] = Field(description="The kept ones, newest first")


class UserFeaturesResponse(Body):
    """What the online store knows of a user now."""

    user_id: str
    known: bool
    at: datetime = Field(description="The moment that ages refer to, UTC")
    sequences: dict[str, SceneHistory] = Field(description="By scene")
    dense: dict[str, float | None] = Field(description="By name; null where missing or expired")


class HealthResponse(Body):
    """What is being served."""

    status: str = Field(description="`ok`")
    run: str
    encoder_fingerprint: str
    dataset: str


class Problem(BaseModel):
    """One thing that is wrong with a request."""

    loc: list[str | int] = Field(description="Where: `body`, then the names of the fields")
    msg: str
    type: str


class Invalid(BaseModel):
    """A malformed request."""

    detail: list[Problem]


class Failure(BaseModel):
    """A request that could not be answered."""

    detail: str
