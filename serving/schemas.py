"""What the HTTP interface takes, with the limits that it promises (responses.py: what it gives)."""

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, cast

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from pydantic_core import PydanticCustomError

from feature_repo.behavior import normalize
from serving.answers import AddedBehavior, HistoryChanges
from serving.event_rules import CONTROL_CHARACTERS, MAX_ID_LENGTH, LiveEvent
from serving.sentences import sentence

MAX_CANDIDATES = 1000
MAX_TOP_K = 1000
MAX_EXPLAINED = 50
MAX_BATCH = 64
MAX_EVENTS = 1000
MAX_CHANGES = 1000
MAX_CONTEXT = 100
MAX_FOUND = 100
MAX_TEXT_LENGTH = 1000  # what ingest takes by default (feature_repo.dataset.Options)

_NO_CONTROLS = rf"^[^{CONTROL_CHARACTERS}]+$"
"""An id or a text of the data set's own never has them, and logs stay readable."""

Identifier = Annotated[
    str,
    StringConstraints(strict=True, min_length=1, max_length=MAX_ID_LENGTH, pattern=_NO_CONTROLS),
]
Text = Annotated[
    str,
    StringConstraints(strict=True, min_length=1, max_length=MAX_TEXT_LENGTH, pattern=_NO_CONTROLS),
]
StrictNumber = Annotated[FiniteFloat, Field(strict=True)]
Place = Annotated[int, Field(strict=True, ge=0, lt=100_000)]
TopK = Annotated[int, Field(strict=True, ge=1, le=MAX_TOP_K)]
Context = Annotated[
    dict[str, StrictNumber],
    Field(max_length=MAX_CONTEXT),
]


def _only_text(value: Any) -> Any:
    # A number would be taken as epoch seconds or milliseconds, by its size.
    if not isinstance(value, str):
        raise ValueError("expected a date and time with zone, such as 2026-01-31T12:00:00Z")
    return value


Moment = Annotated[AwareDatetime, BeforeValidator(_only_text, json_schema_input_type=datetime)]


class Body(BaseModel):
    """Every body: unknown fields are refused, NaN and infinity never pass."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def examples(*values: dict[str, Any]) -> ConfigDict:
    """Return the configuration of a model that shows these in OpenAPI."""
    return ConfigDict(json_schema_extra={"examples": list(values)})


_CONTEXT_FIELD: Any = Field(
    default_factory=dict,
    description="What the request itself tells, by the names that the model was trained with",
)


class BehaviorToAdd(Body):
    """A behaviour that the user did not have; `text` left out: the item's title."""

    scene: Identifier
    text: Text | None = None
    item_id: Identifier | None = None

    @field_validator("text")
    @classmethod
    def _is_not_blank(cls, text: str | None) -> str | None:
        # Known before anything is read: one in a batch refuses all, as other malformed ones do.
        if text is not None and not normalize(text, lowercase=False):
            raise PydanticCustomError("blank_text", "The text is blank")
        return text


class Changes(Body):
    """A history that might have been; nothing is stored."""

    removed: Annotated[list[Place], Field(max_length=MAX_CHANGES)] = Field(
        default_factory=list,
        description="Places in the user's history that are left out, 0 = newest",
    )
    added: Annotated[list[BehaviorToAdd], Field(max_length=MAX_CHANGES)] = Field(
        default_factory=list, description="Behaviours of just now, oldest first"
    )


def as_changes(changes: Changes | None) -> HistoryChanges | None:
    """Return what the ranker takes."""
    if changes is None:
        return None
    return HistoryChanges(
        removed=tuple(changes.removed),
        added=tuple(
            AddedBehavior(scene=one.scene, text=one.text, item_id=one.item_id)
            for one in changes.added
        ),
    )


_CHANGES_FIELD: Any = Field(
    None, description="A history that might have been, for what-if questions"
)


class RankRequest(Body):
    """Whom to rank for, and what."""

    model_config = examples(
        {"user_id": "14911", "top_k": 5},
        {"user_id": "14911", "candidates": ["85123A", "22423"], "top_k": 2, "explain": True},
        {"user_id": "14911", "changes": {"removed": [0]}},
    )

    user_id: Identifier
    candidates: (
        Annotated[list[Identifier], Field(min_length=1, max_length=MAX_CANDIDATES)] | None
    ) = Field(None, description="Item ids to rank; left out: the whole catalogue")
    top_k: TopK = Field(10, description="Most items to return")
    context: Context = _CONTEXT_FIELD
    changes: Changes | None = _CHANGES_FIELD
    explain: Annotated[bool, Field(strict=True)] = Field(
        False,
        description="Tell the behaviours that pulled each item up or down; then `top_k` is at most "
        f"{MAX_EXPLAINED}",
    )


class BatchRequest(Body):
    """Several rankings at once."""

    model_config = examples(
        {"requests": [{"user_id": "14911", "top_k": 5}, {"user_id": "12748", "top_k": 5}]}
    )

    requests: Annotated[list[RankRequest], Field(min_length=1, max_length=MAX_BATCH)]


class ExplainRequest(Body):
    """Whose score of which item to explain."""

    model_config = examples({"user_id": "14911", "item_id": "85123A"})

    user_id: Identifier
    item_id: Identifier
    context: Context = _CONTEXT_FIELD
    changes: Changes | None = _CHANGES_FIELD


class EventEntry(Body):
    """A behaviour that just happened."""

    event_id: Identifier = Field(
        description="Your own; the same id again is the same event and changes nothing"
    )
    user_id: Identifier
    scene: Identifier = Field(description="One of the data set's")
    text: Text | None = Field(None, description="As in the data; left out: the item's title")
    item_id: Identifier | None = Field(None, description="What it is about, if anything")
    event_timestamp: Moment | None = Field(None, description="When; left out: now")

    def as_event(self) -> LiveEvent:
        """Return what the journal takes."""
        return LiveEvent(
            event_id=self.event_id,
            user_id=self.user_id,
            scene=self.scene,
            text=self.text,
            item_id=self.item_id,
            event_timestamp=self.event_timestamp,
        )


@dataclass(frozen=True)
class _Malformed:
    """In the place of an event that is none: why, in a sentence."""

    reason: str


def _one_for_itself(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """One event that is malformed must not refuse a thousand others."""
    try:
        return check(value)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"][:1] if part in EventEntry.model_fields)
        return _Malformed(": ".join(filter(None, (place, sentence(first, EventEntry)))))


class EventsRequest(Body):
    """New behaviours, in any order."""

    model_config = examples(
        {
            "events": [
                {
                    "event_id": "order-581587-1",
                    "user_id": "14911",
                    "scene": "purchase",
                    "text": "white hanging heart t-light holder",
                    "item_id": "85123A",
                }
            ]
        }
    )

    events: Annotated[
        list[Annotated[EventEntry, WrapValidator(_one_for_itself)]],
        Field(min_length=1, max_length=MAX_EVENTS),
    ]

    def entries(self) -> tuple[dict[int, EventEntry], dict[int, str]]:
        """Place -> event, and place -> why it is none."""
        every = cast(list[EventEntry | _Malformed], self.events)
        return (
            {place: one for place, one in enumerate(every) if isinstance(one, EventEntry)},
            {place: one.reason for place, one in enumerate(every) if isinstance(one, _Malformed)},
        )
