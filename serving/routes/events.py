"""New behaviours, posted while they happen."""

from collections.abc import Iterable
from dataclasses import replace

from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError

from serving.event_rules import normalized_id
from serving.events import EventReceipt
from serving.rendering import events_answer
from serving.responses import EventsResponse
from serving.schemas import EventEntry, EventsRequest
from serving.service import FAILURES, EventSink, Json, Service


def add_events(app: FastAPI, service: Service, sink: EventSink) -> None:
    """Add the address that takes events."""

    @app.post(
        "/v1/events",
        response_model=EventsResponse,
        responses=FAILURES,
        summary="Take new behaviours of users",
        description="When it answers, every accepted event is durable and in the online store. "
        "After an error post the same events again: ids that were accepted change nothing. "
        "An event that is malformed or does not fit the data set comes back among the rejected; "
        "the others are taken.",
        tags=["events"],
    )
    async def post_events(request: EventsRequest) -> Json:
        entries, malformed = request.entries()
        _check_distinct(entries.items())
        receipt = EventReceipt(0, 0, ())
        if entries:
            events = [one.as_event() for one in entries.values()]
            receipt = await service.event_work.run(lambda: sink.accept(events))
        places = list(entries)
        rejected = {places[place]: reason for place, reason in receipt.rejected} | malformed
        receipt = replace(receipt, rejected=tuple(sorted(rejected.items())))
        service.deployment.metrics.observe_events(receipt)
        return Json(events_answer(receipt))


def refuse_events(app: FastAPI) -> None:
    """Say that this service takes none, where they would be posted."""

    @app.post("/v1/events", include_in_schema=False)
    async def no_events() -> None:
        raise HTTPException(
            404,
            "this service takes no events: it was started with --no-events, or its data set can "
            "have none, as its log then says",
        )


def _check_distinct(entries: Iterable[tuple[int, EventEntry]]) -> None:
    """Refuse one id for two events: which of them would be the event?"""
    first: dict[str, int] = {}
    problems = []
    for place, event in entries:
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
