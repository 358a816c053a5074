"""New behaviours, posted while they happen."""

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError

from serving.event_rules import normalized_id
from serving.rendering import events_answer
from serving.responses import EventsResponse
from serving.schemas import EventsRequest
from serving.service import FAILURES, EventSink, Json, Service


def add_events(app: FastAPI, service: Service, sink: EventSink) -> None:
    """Add the address that takes events."""

    @app.post(
        "/v1/events",
        response_model=EventsResponse,
        responses=FAILURES,
        summary="Take new behaviours of users",
        description="When it answers, every accepted event is durable and in the online store. "
        "After an error post the same events again: ids that were accepted change nothing.",
        tags=["events"],
    )
    async def events(request: EventsRequest) -> Json:
        _check_distinct(request)
        taken = [one.as_event() for one in request.events]
        receipt = await service.event_work.run(lambda: sink.accept(taken))
        service.deployment.metrics.observe_events(receipt)
        return Json(events_answer(receipt))


def _check_distinct(request: EventsRequest) -> None:
    """Refuse one id for two events: which of them would be the event?"""
    first: dict[str, int] = {}
    problems = []
    for place, event in enumerate(request.events):
        if (before := first.setdefault(normalized_id(event.event_id), place)) != place:
            problems.append(
                {
                    "type": "duplicate_event_id",
                    "loc": ("body", "events", place, "event_id"),
                    "msg": f"Event {before} of this request has the same id",
                }
            )
    if problems:
        raise RequestValidationError(problems)
