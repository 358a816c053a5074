"""The HTTP interface, put together: addresses, guards, errors, and the page at ``/``.

Every answer is JSON without NaN. A malformed request is a 422 that names the field and never
repeats what came, a user whom nobody knows is an answer that says so, and no answer carries a stack
trace.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from asgi_correlation_id import CorrelationIdMiddleware
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.staticfiles import StaticFiles

from feature_repo.errors import LongtrailError
from serving.answers import UnknownItemError, UnusableChangeError
from serving.breaker import CircuitOpenError
from serving.deployment import WAITING_RETRY_S, Deployment, NotLoadedError
from serving.directory import Directory
from serving.event_rules import MAX_ID_LENGTH
from serving.middleware import Guarded, Hosted, Limited, Observed, is_request_id
from serving.rate_limit import RateLimit
from serving.routes.events import add_events, refuse_events
from serving.routes.lookups import add_items, add_users
from serving.routes.ranking import add_ranking
from serving.routes.state import add_state
from serving.security import ApiKeys, required_scope
from serving.sentences import sentence
from serving.service import EventSink, Json, ServedRecorder, Service
from serving.work import OverloadedError, WorkPool

VERSION = "1"
PAGE = Path(__file__).parent / "page" / "static"
SAMPLE_INTERVAL_S = 2.0
"""Between two looks at what nobody counts for Prometheus by itself."""
_RETRY_AFTER_S = 1
_EVENT_THREADS = 2
_SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AppSettings:
    """What the HTTP interface lets through."""

    threads: int = 4
    """Requests that are computed side by side, at least 1."""
    max_waiting: int = 64
    """Requests that may wait for a thread; beyond them it answers 503, at least 0."""
    max_body_bytes: int = 2 * 2**20
    keys: ApiKeys | None = None
    """Who may ask; None for everyone."""
    rate_limit: str | None = None
    """Requests of one key or address, as "100/second"; None for no limit."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may ask."""
    allowed_hosts: tuple[str, ...] = ("*",)
    """Hosts that requests may name (:func:`serving.security.hosts_allowed`); "*" for any."""
    check_age_s: float = 1.0
    """Seconds that readiness relies on its last look at the store, at least 0."""


def create_app(
    deployment: Deployment,
    *,
    directory: Directory,
    events: EventSink | None = None,
    served_log: ServedRecorder | None = None,
    settings: AppSettings | None = None,
    samplers: Sequence[Callable[[], None]] = (),
) -> FastAPI:
    """Build the application.

    Args:
        deployment: Holds a ranker that is warmed up, or will: what needs it is a 503 until then.
        directory: Users and items by name.
        events: Takes live events; without it there is no ``/v1/events``.
        served_log: Logs what rankings were computed from.
        settings: Limits and guards.
        samplers: Bring metrics up to date that nothing pushes; called now and then.

    Raises:
        LongtrailError: If a setting cannot be used.
    """
    settings = settings or AppSettings()
    metrics = deployment.metrics

    sample = _Samplers(samplers)

    @asynccontextmanager
    async def sampling(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(_every(SAMPLE_INTERVAL_S, sample))
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    app = FastAPI(
        title="Longtrail",
        version=VERSION,
        description="Ranked items for a user id, from the features that the model was trained on.",
        # Its pages would load scripts from elsewhere; /openapi.json is read by any tool.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=sampling,
    )
    service = Service(
        deployment=deployment,
        directory=directory,
        work=WorkPool(threads=settings.threads, max_waiting=settings.max_waiting),
        event_work=WorkPool(threads=_EVENT_THREADS, max_waiting=settings.max_waiting),
        events=events,
        served_log=served_log,
    )
    add_ranking(app, service)
    add_users(app, service)
    add_items(app, service)
    if events is not None:
        add_events(app, service, events)
    else:
        refuse_events(app)
    add_state(
        app,
        service,
        sample,
        check_age_s=settings.check_age_s,
        has_keys=settings.keys is not None,
    )
    _add_page(app)

    def unavailable(request: Request, error: Exception) -> Json:
        if isinstance(error, OverloadedError):
            metrics.refused.labels("overloaded").inc()
        return _failure(request, error)

    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(LongtrailError, unavailable)
    # The last one added is the first to see a request.
    rate_limit = RateLimit(settings.rate_limit) if settings.rate_limit else None
    app.add_middleware(Limited, max_body_bytes=settings.max_body_bytes, metrics=metrics)
    app.add_middleware(Guarded, keys=settings.keys, rate_limit=rate_limit, metrics=metrics)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-api-key", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    if "*" not in settings.allowed_hosts:
        app.add_middleware(Hosted, hosts=settings.allowed_hosts, metrics=metrics)
    app.add_middleware(Observed, metrics=metrics)
    app.add_middleware(CorrelationIdMiddleware, validator=is_request_id)
    if settings.keys is not None:
        _document_keys(app)
    return app


class _Samplers:
    """Calls all samplers: one that fails is left out this time, and told of the first time."""

    def __init__(self, samplers: Sequence[Callable[[], None]]) -> None:
        self._samplers = tuple(samplers)
        self._failed: set[int] = set()

    def __call__(self) -> None:
        for number, sampler in enumerate(self._samplers):
            try:
                sampler()
            except Exception:  # noqa: BLE001  # one that fails must not end the others
                if number not in self._failed:
                    self._failed.add(number)
                    _log.exception("metrics cannot be brought up to date: this is a defect")


async def _every(seconds: float, work: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(seconds)
        work()


def _add_page(app: FastAPI) -> None:
    """Serve the page's files at every address that is no other's."""
    if PAGE.is_dir():
        # Not a mount: it would match the API's addresses too, and turn their 405 into a 404.
        app.router.default = StaticFiles(directory=PAGE, html=True)


def _document_keys(app: FastAPI) -> None:
    document = app.openapi()
    document["components"]["securitySchemes"] = _SECURITY_SCHEMES
    for path, operations in document["paths"].items():
        if required_scope(path):
            for operation in operations.values():
                operation["security"] = [{name: []} for name in _SECURITY_SCHEMES]


async def _malformed(request: Request, error: Exception) -> Json:
    """422 without echoing the input: it may hold NaN, half a surrogate pair or megabytes."""
    problems = cast(RequestValidationError, error).errors()
    body = request.scope["route"].body_field
    model = body.field_info.annotation if body is not None else None
    return _invalid(
        [
            {
                "loc": [part if isinstance(part, int) else _printable(part) for part in one["loc"]],
                "msg": _printable(sentence({**one, "loc": one["loc"][1:]}, model)),
                "type": one["type"],
            }
            for one in problems
        ]
    )


def _failure(request: Request, error: Exception) -> Json:
    """Say what cannot be answered: by the caller's fault, or for lack of what serving stands on."""
    if isinstance(error, UnknownItemError):
        return Json({"detail": "the feature store does not know this item"}, status_code=404)
    if isinstance(error, UnusableChangeError):
        where = ["body", "changes", *error.place]
        return _invalid([{"loc": where, "msg": _printable(error.reason), "type": "unusable"}])
    if type(error) is LongtrailError:
        # Not of the store, the artifact or a step: the ranker's own, on what was asked.
        return _invalid([{"loc": ["body"], "msg": _printable(str(error)), "type": "unusable"}])
    retry_after_s = _RETRY_AFTER_S
    if isinstance(error, CircuitOpenError):
        retry_after_s = math.ceil(error.retry_after_s)
    elif isinstance(error, NotLoadedError):  # in the log already, once for each try
        retry_after_s = math.ceil(WAITING_RETRY_S)
    elif not isinstance(error, OverloadedError):
        _log.error("%s cannot be answered: %s", request.scope["route"].path, error)
    headers = {"retry-after": str(retry_after_s)}
    return Json({"detail": str(error)}, status_code=503, headers=headers)


def _invalid(problems: list[dict[str, Any]]) -> Json:
    return Json({"detail": problems}, status_code=422)


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()[:MAX_ID_LENGTH]
