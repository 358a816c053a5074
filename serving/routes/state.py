"""The service about itself: the model card, whether it lives, whether it can rank, its metrics."""

from collections.abc import Callable

import anyio.to_thread
from fastapi import FastAPI, Response
from fastapi.responses import PlainTextResponse

from feature_repo.errors import LongtrailError
from serving.metrics import CONTENT_TYPE
from serving.rendering import model_answer
from serving.responses import HealthResponse, ModelResponse, ReadyResponse
from serving.service import FAILURES, Json, Service

RETRY_AFTER = {"retry-after": "5"}


def add_state(app: FastAPI, service: Service, sample: Callable[[], None]) -> None:
    """Add the addresses.

    Args:
        app: Where to.
        service: What they tell of.
        sample: Brings metrics up to date that nothing pushes.
    """

    @app.get(
        "/v1/model",
        response_model=ModelResponse,
        responses=FAILURES,
        summary="The model card",
        tags=["state"],
    )
    async def model() -> Json:
        ranker, shadow = service.deployment.ranker(), service.deployment.shadow
        return Json(
            model_answer(
                ranker.manifest,
                num_items=ranker.num_items,
                items_at=ranker.items_at,
                shadow=shadow.run if shadow else None,
            )
        )

    @app.get("/healthz", response_model=HealthResponse, summary="It lives", tags=["state"])
    async def healthz() -> Json:
        return Json({"status": "ok"})

    @app.get(
        "/readyz",
        response_model=ReadyResponse,
        responses={503: {"model": ReadyResponse, "description": "It cannot rank now"}},
        summary="It can rank: a model is loaded, and the store answers",
        tags=["state"],
    )
    async def readyz() -> Json:
        deployment = service.deployment
        ranker = deployment.ranker()
        notes = [deployment.problem] if deployment.problem else []
        answer = {"ready": True, "run": ranker.manifest.run, "notes": notes}
        try:
            # Past the queue of requests: a service that is busy is ready.
            await anyio.to_thread.run_sync(ranker.check)
        except LongtrailError as error:
            answer |= {"ready": False, "detail": str(error)}
            return Json(answer, status_code=503, headers=RETRY_AFTER)
        return Json(answer)

    @app.get(
        "/metrics",
        response_class=PlainTextResponse,
        summary="What Prometheus reads",
        tags=["state"],
    )
    async def metrics() -> Response:
        sample()
        return Response(service.deployment.metrics.text(), media_type=CONTENT_TYPE)
