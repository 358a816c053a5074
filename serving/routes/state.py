"""The service about itself: the model card, whether it lives, whether it can rank, its metrics."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse

from feature_repo.errors import LongtrailError
from serving.deployment import NotLoadedError
from serving.metrics import CONTENT_TYPE
from serving.middleware import KEY_NAME
from serving.question import ServingRanker
from serving.rendering import model_answer
from serving.responses import HealthResponse, ModelResponse, ReadyResponse
from serving.service import FAILURES, Json, Service, encoded
from serving.work import WorkPool

RETRY_AFTER = {"retry-after": "5"}
HIDDEN = "callers with an API key are told why"
_REFUSALS: dict[int | str, dict[str, Any]] = {status: FAILURES[status] for status in (421, 429)}
_MAX_WAITING = 8
"""Requests for metrics that wait for the one that is answered."""


def add_state(
    app: FastAPI,
    service: Service,
    sample: Callable[[], None],
    *,
    check_age_s: float,
    has_keys: bool,
) -> None:
    """Add the addresses.

    Args:
        app: Where to.
        service: What they tell of.
        sample: Brings metrics up to date that nothing pushes; safe for threads.
        check_age_s: Seconds that readiness relies on its last look at the store, at least 0.
        has_keys: Whether callers need keys: details of readiness name hosts and folders, which are
            then for those with a valid one.
    """
    checks = _StoreChecks(check_age_s)
    metrics_work = WorkPool(threads=1, max_waiting=_MAX_WAITING)

    @app.get(
        "/v1/model",
        response_model=ModelResponse,
        responses=FAILURES,
        summary="The model card",
        tags=["state"],
    )
    async def model() -> Json:
        ranker, shadow = service.deployment.ranker(), service.deployment.shadow

        def work() -> bytes:
            return encoded(
                model_answer(
                    ranker.manifest,
                    num_items=ranker.num_items,
                    items_at=ranker.items_at,
                    shadow=shadow.run if shadow else None,
                )
            )

        return Json(await service.work.run(work))

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", response_model=HealthResponse, summary="It lives", tags=["state"])
    async def healthz() -> Json:
        return Json({"status": "ok"})

    @app.head("/readyz", include_in_schema=False)
    @app.get(
        "/readyz",
        response_model=ReadyResponse,
        responses=_REFUSALS | {503: {"model": ReadyResponse, "description": "It cannot rank now"}},
        summary="It can rank: a model is loaded, and the store answers",
        tags=["state"],
    )
    async def readyz(request: Request) -> Json:
        deployment = service.deployment
        is_told = not has_keys or KEY_NAME in request.scope
        answer: dict[str, Any] = {"ready": True, "run": deployment.run, "notes": []}
        fault: str | None
        try:
            ranker = deployment.ranker()
        except NotLoadedError as error:
            fault = str(error)
        else:
            if deployment.problem:
                answer["notes"] = [
                    deployment.problem if is_told else f"another run cannot be served; {HIDDEN}"
                ]
            fault = await checks.fault(ranker)
        if fault is None:
            return Json(answer)
        answer |= {"ready": False, "detail": fault if is_told else f"it cannot rank now; {HIDDEN}"}
        return Json(answer, status_code=503, headers=RETRY_AFTER)

    @app.get(
        "/metrics",
        response_class=PlainTextResponse,
        responses=_REFUSALS | {503: FAILURES[503]},
        summary="What Prometheus reads",
        tags=["state"],
    )
    async def metrics() -> Response:
        def work() -> bytes:
            sample()
            return service.deployment.metrics.text()

        return Response(await metrics_work.run(work), media_type=CONTENT_TYPE)


class _StoreChecks:
    """Looks whether a ranker can rank, at most once in a while however many ask.

    Args:
        age_s: Seconds that an outcome stands, at least 0.
    """

    def __init__(self, age_s: float) -> None:
        self._age_s = age_s
        self._lock = asyncio.Lock()
        self._run: str | None = None  # not the ranker: one that was replaced must be gone
        self._until = 0.0
        self._fault: str | None = None

    async def fault(self, ranker: ServingRanker) -> str | None:
        """Return why it cannot rank; None if it can."""
        async with self._lock:
            if self._run != ranker.manifest.run or time.monotonic() >= self._until:
                try:
                    # Past the queue of requests: a service that is busy is ready.
                    await anyio.to_thread.run_sync(ranker.check)
                    self._fault = None
                except LongtrailError as error:
                    self._fault = str(error)
                self._run = ranker.manifest.run
                self._until = time.monotonic() + self._age_s
            return self._fault
