"""Rankings, one or several at once, and explanations."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from asgi_correlation_id import correlation_id
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError

from feature_repo.artifact import ArtifactManifest
from feature_repo.errors import LongtrailError
from serving.question import Question, ServingRanker
from serving.rendering import explanation_answer, ranking_answer
from serving.responses import MAX_CONTRIBUTIONS, BatchResponse, ExplainResponse, RankResponse
from serving.schemas import (
    MAX_EXPLAINED,
    BatchRequest,
    ExplainRequest,
    RankRequest,
    as_changes,
)
from serving.service import FAILURES, Json, Service, encoded

_Problem = dict[str, Any]
_Place = tuple[str | int, ...]


def add_ranking(app: FastAPI, service: Service) -> None:
    """Add the addresses."""

    @app.post(
        "/v1/rank",
        response_model=RankResponse,
        responses=FAILURES,
        summary="Rank items for a user",
        tags=["ranking"],
    )
    async def rank(request: RankRequest) -> Json:
        ranker = service.deployment.ranker()
        _refuse(_rank_problems(request, ranker.manifest, ("body",)))
        work = partial(_ranked, service, ranker, request, correlation_id.get() or "")
        return Json(await service.work.run(lambda: encoded(work())))

    @app.post(
        "/v1/rank:batch",
        response_model=BatchResponse,
        responses=FAILURES,
        summary="Rank for several users at once",
        tags=["ranking"],
    )
    async def rank_batch(request: BatchRequest) -> Json:
        ranker = service.deployment.ranker()
        problems = [
            problem
            for place, one in enumerate(request.requests)
            for problem in _rank_problems(one, ranker.manifest, ("body", "requests", place))
        ]
        _refuse(problems)
        request_id = correlation_id.get() or ""
        return Json(
            await service.work.run(
                lambda: encoded(
                    {
                        "results": [
                            _result(service, ranker, one, f"{request_id}/{place}")
                            for place, one in enumerate(request.requests)
                        ]
                    }
                )
            )
        )

    @app.post(
        "/v1/explain",
        response_model=ExplainResponse,
        responses=FAILURES,
        summary="Why an item has its score for a user",
        tags=["ranking"],
    )
    async def explain(request: ExplainRequest) -> Json:
        ranker = service.deployment.ranker()
        _refuse(_problems(request, ranker.manifest, ("body",)))

        def work() -> bytes:
            explanation = ranker.explain(
                request.user_id,
                request.item_id,
                context=request.context,
                changes=as_changes(request.changes),
            )
            return encoded(explanation_answer(explanation))

        return Json(await service.work.run(work))


def _ranked(
    service: Service, ranker: ServingRanker, request: RankRequest, request_id: str
) -> dict[str, Any]:
    """Answer one request, and tell whoever watches."""
    question = Question(
        user_id=request.user_id,
        candidates=request.candidates,
        top_k=request.top_k,
        context=request.context,
        changes=as_changes(request.changes),
        num_contributions=MAX_CONTRIBUTIONS if request.explain else 0,
    )
    ranking = question.put_to(ranker)
    deployment = service.deployment
    deployment.metrics.observe_ranking(ranking)
    if service.served_log is not None:
        service.served_log.record(ranking, request.context, request_id)
    if deployment.shadow is not None:
        deployment.shadow.offer(question, ranking)
    return ranking_answer(ranking, request_id, explained=request.explain)


def _result(
    service: Service, ranker: ServingRanker, request: RankRequest, request_id: str
) -> dict[str, Any]:
    """Answer one of a batch: where one cannot be answered, the others still are."""
    try:
        return _ranked(service, ranker, request, request_id)
    except LongtrailError as error:
        return {"error": str(error)}


def _rank_problems(
    request: RankRequest, manifest: ArtifactManifest, place: _Place
) -> list[_Problem]:
    problems = _problems(request, manifest, place)
    if request.explain and request.top_k > MAX_EXPLAINED:
        problems.append(
            {
                "type": "less_than_equal",
                "loc": (*place, "top_k"),
                "msg": f"With `explain` it should be at most {MAX_EXPLAINED}",
            }
        )
    return problems


def _problems(
    request: RankRequest | ExplainRequest, manifest: ArtifactManifest, place: _Place
) -> list[_Problem]:
    """Find what is wrong with a request for this model, though its form is right."""
    problems: list[_Problem] = []
    for name, value in request.context.items():
        where = (*place, "context", name)
        if name not in manifest.context_names:
            reads = _listed(manifest.context_names)
            sentence = f"The model reads no context of this name; it reads {reads}"
            problems.append({"type": "unknown_context", "loc": where, "msg": sentence})
        elif abs(value) > _MAX_FLOAT32:
            sentence = "The model reads 32-bit numbers, and this is none"
            problems.append({"type": "finite_number", "loc": where, "msg": sentence})
    for number, added in enumerate(request.changes.added if request.changes else ()):
        where = (*place, "changes", "added", number)
        if added.scene not in manifest.scenes:
            sentence = f"The model reads no such scene; it reads {_listed(manifest.scenes)}"
            problems.append({"type": "unknown_scene", "loc": (*where, "scene"), "msg": sentence})
        if added.text is None and added.item_id is None:
            sentence = "`text` or `item_id` is needed"
            problems.append({"type": "missing", "loc": where, "msg": sentence})
    return problems


_MAX_FLOAT32 = math.ldexp(1 - 2.0**-24, 128)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _refuse(problems: list[_Problem]) -> None:
    if problems:
        raise RequestValidationError(problems)
