"""What every address of the HTTP interface shares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson
from fastapi import Response

from serving.answers import Ranking
from serving.deployment import Deployment
from serving.directory import Directory
from serving.event_rules import LiveEvent
from serving.events import EventReceipt
from serving.responses import Failure, Invalid
from serving.work import WorkPool

FAILURES: dict[int | str, dict[str, Any]] = {
    400: {"model": Failure, "description": "The body is JSON that cannot be read: nested too deep"},
    401: {"model": Failure, "description": "No valid API key, where keys are asked for"},
    403: {"model": Failure, "description": "The API key lacks the scope"},
    404: {"model": Failure, "description": "Not known"},
    413: {"model": Failure, "description": "The body is too large"},
    421: {"model": Failure, "description": "Asked under a host that is not allowed"},
    422: {"model": Invalid, "description": "Malformed; every entry names its field"},
    429: {"model": Failure, "description": "Too many requests; Retry-After says when"},
    503: {"model": Failure, "description": "Cannot be answered now; Retry-After says when"},
}
"""What any address of the API may answer instead."""


class EventSink(Protocol):
    """Takes live events (:class:`serving.event_service.FollowingEvents`); safe for threads."""

    def accept(self, events: Sequence[LiveEvent]) -> EventReceipt:
        """Make the events durable and known to the next ranking."""


class ServedRecorder(Protocol):
    """Logs what rankings were computed from (:class:`serving.served_log.ServedLog`)."""

    def record(self, ranking: Ranking, context: Mapping[str, float], request_id: str) -> None:
        """Log an answer, if it is one of those that are logged; never waits, never raises."""


@dataclass(frozen=True)
class Service:
    """The parts that answer requests.

    Args:
        deployment: Holds the ranker.
        directory: Users and items by name.
        work: Threads that read and rank.
        event_work: Threads that take events: a journal that is slow holds up no ranking.
        events: Takes live events; None where this service takes none.
        served_log: Logs what rankings were computed from, if anything does.
    """

    deployment: Deployment
    directory: Directory
    work: WorkPool
    event_work: WorkPool
    events: EventSink | None
    served_log: ServedRecorder | None


class Json(Response):
    """An answer as JSON, built at once: no model stands between it and the bytes."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the bytes; what is encoded already stays."""
        return content if isinstance(content, bytes) else encoded(content)


def encoded(answer: Any) -> bytes:
    """JSON of an answer; NaN becomes null, times are UTC with a Z."""
    return orjson.dumps(answer, option=orjson.OPT_UTC_Z)
