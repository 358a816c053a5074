"""The HTTP interface: ranking and features by user id.

Every answer is JSON without NaN. A malformed request is a 422 that names the field, a user or item
that nobody knows is an answer that says so, and no answer carries a stack trace.
"""

import logging
import math
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from feature_repo.errors import LongtrailError
from serving.ranker import Ranker
from serving.schemas import (
    MAX_ID_LENGTH,
    BehaviorEntry,
    Failure,
    HealthResponse,
    Identifier,
    Invalid,
    RankedEntry,
    RankRequest,
    RankResponse,
    SceneHistory,
    UserFeaturesResponse,
)

VERSION = "1"

_log = logging.getLogger(__name__)

_RESPONSES: dict[int | str, dict[str, Any]] = {
    422: {"model": Invalid, "description": "Malformed; every entry names its field"},
    503: {"model": Failure, "description": "The feature store cannot answer now"},
}


def create_app(ranker: Ranker) -> FastAPI:
    """Build the application over a ready ranker.

    Args:
        ranker: Serves every request; call its ``warm_up`` before, or the first request pays for it.
    """
    app = FastAPI(
        title="Longtrail",
        version=VERSION,
        description="Ranked items for a user id, from the features that the model was trained on.",
    )
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(LongtrailError, _unavailable)
    app.add_exception_handler(Exception, _defect)

    # Plain functions, not coroutines: the model runs in the thread pool and blocks nobody.
    @app.post("/v1/rank", responses=_RESPONSES, summary="Rank items for a user")
    def rank(request: RankRequest) -> RankResponse:
        _check_context(request, ranker)
        ranking = ranker.rank(
            request.user_id,
            candidates=request.candidates,
            top_k=request.top_k,
            context=request.context,
        )
        return RankResponse(
            user_id=ranking.user_id,
            known=ranking.known,
            model=ranking.model,
            ranked=[
                RankedEntry(
                    item_id=item.item_id, text=item.text, score=item.score, reason=item.reason
                )
                for item in ranking.ranked
            ],
            unknown_items=list(ranking.unknown_items),
            notes=list(ranking.notes),
        )

    # ":path", because a user id may hold a slash.
    @app.get(
        "/v1/users/{user_id:path}/features",
        responses=_RESPONSES,
        summary="What the online store knows of a user",
    )
    def user_features(
        user_id: Annotated[
            Identifier, Path(description=f"At most {MAX_ID_LENGTH} characters", examples=["14911"])
        ],
    ) -> UserFeaturesResponse:
        view = ranker.user(user_id)
        return UserFeaturesResponse(
            user_id=user_id,
            known=view.known,
            at=view.at,
            sequences={
                scene: SceneHistory(
                    total=total,
                    behaviors=[
                        BehaviorEntry(text=behavior.text, time=behavior.time)
                        for behavior in view.history
                        if behavior.scene == scene
                    ],
                )
                for scene, total in view.totals.items()
            },
            dense={
                name: value if math.isfinite(value) else None for name, value in view.dense.items()
            },
        )

    @app.get("/healthz", summary="What is being served")
    def healthz() -> HealthResponse:
        return HealthResponse(
            status="ok",
            run=ranker.manifest.run,
            encoder_fingerprint=ranker.manifest.encoder_fingerprint,
            dataset=ranker.manifest.dataset,
        )

    return app


def _check_context(request: RankRequest, ranker: Ranker) -> None:
    names = ranker.manifest.context_names
    known = ", ".join(names) or "none"
    problems = [
        {
            "type": "unknown_context",
            "loc": ("body", "context", name),
            "msg": f"The model reads no context of this name; it reads {known}",
        }
        for name in request.context
        if name not in names
    ]
    if problems:
        raise RequestValidationError(problems)


async def _malformed(_: Request, error: Exception) -> JSONResponse:
    """422 without echoing the input: it may hold NaN, half a surrogate pair or megabytes."""
    assert isinstance(error, RequestValidationError)
    detail = [
        {
            "loc": [part if isinstance(part, int) else _printable(part) for part in entry["loc"]],
            "msg": _printable(entry["msg"]),
            "type": entry["type"],
        }
        for entry in error.errors()
    ]
    return JSONResponse({"detail": detail}, status_code=422)


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()[:MAX_ID_LENGTH]


async def _unavailable(request: Request, error: Exception) -> JSONResponse:
    """503: what the store or the artifact does not give is the operator's to mend."""
    _log.error("%s: %s", request.url.path, error)
    return JSONResponse({"detail": str(error)}, status_code=503)


async def _defect(request: Request, error: Exception) -> JSONResponse:
    """500 with no detail; Starlette raises the error again, so the server logs its traceback."""
    _log.error("%s: unexpected %s", request.url.path, type(error).__name__)
    return JSONResponse({"detail": "internal error"}, status_code=500)
