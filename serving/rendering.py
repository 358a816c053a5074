"""From the ranker's dataclasses to the answers that :mod:`serving.responses` describes.

They are built without a model in between: one of a thousand items would cost milliseconds.
"""

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from feature_repo.artifact import ArtifactManifest
from serving.answers import Contribution, Explanation, Ranking, SimilarItem, UserView
from serving.events import EventReceipt
from serving.history import Behavior


def ranking_answer(ranking: Ranking, request_id: str, *, explained: bool) -> dict[str, Any]:
    """A :class:`RankResponse`; with the contributions to each score if ``explained``."""
    ranked: list[dict[str, Any]] = [
        {"item_id": item.item_id, "text": item.text, "score": item.score, "reason": item.reason}
        for item in ranking.ranked
    ]
    if explained:
        for entry, item in zip(ranked, ranking.ranked, strict=True):
            entry["contributions"] = [_contribution(one) for one in item.contributions]
    return {
        "request_id": request_id,
        "user_id": ranking.user_id,
        "known": ranking.known,
        "model": ranking.model,
        "at": ranking.at,
        "path": ranking.path,
        "ranked": ranked,
        "unknown_items": ranking.unknown_items,
        "notes": ranking.notes,
        "degraded": ranking.degraded,
    }


def explanation_answer(explanation: Explanation) -> dict[str, Any]:
    """An :class:`ExplainResponse`."""
    return {
        "user_id": explanation.user_id,
        "item_id": explanation.item_id,
        "text": explanation.text,
        "model": explanation.model,
        "at": explanation.at,
        "score": explanation.score,
        "score_without_history": explanation.score_without_history,
        "contributions": [_contribution(one) for one in explanation.contributions],
        "reason": explanation.reason,
    }


def user_answer(user_id: str, view: UserView) -> dict[str, Any]:
    """A :class:`UserResponse`."""
    return {
        "user_id": user_id,
        "known": view.known,
        "at": view.at,
        "history": [{**_behavior(one), "item_id": one.item_id} for one in view.history],
        "totals": view.totals,
        "features": {
            name: value if math.isfinite(value) else None for name, value in view.dense.items()
        },
        "feature_age_s": view.feature_age_s,
    }


def similar_answer(item_id: str, similar: Sequence[SimilarItem]) -> dict[str, Any]:
    """A :class:`SimilarResponse`."""
    return {
        "item_id": item_id,
        "similar": [
            {"item_id": one.item_id, "text": one.text, "similarity": one.similarity}
            for one in similar
        ],
    }


def events_answer(receipt: EventReceipt) -> dict[str, Any]:
    """An :class:`EventsResponse`."""
    return {
        "accepted": receipt.accepted,
        "duplicates": receipt.duplicates,
        "rejected": [{"index": index, "reason": reason} for index, reason in receipt.rejected],
    }


def model_answer(
    manifest: ArtifactManifest, *, num_items: int, items_at: datetime, shadow: str | None
) -> dict[str, Any]:
    """A :class:`ModelResponse`; metrics without a value are null."""
    return {
        "run": manifest.run,
        "recipe": manifest.recipe,
        "dataset": manifest.dataset,
        "encoder_fingerprint": manifest.encoder_fingerprint,
        "created": manifest.created,
        "train_start": manifest.train_start,
        "train_end": manifest.train_end,
        "scenes": manifest.scenes,
        "sequence_length": manifest.sequence_length,
        "context_names": manifest.context_names,
        "metrics": manifest.metrics,
        "calibration": manifest.calibration and manifest.calibration.method,
        "num_items": num_items,
        "items_at": items_at,
        "shadow": shadow,
    }


def _behavior(behavior: Behavior) -> dict[str, Any]:
    return {"text": behavior.text, "scene": behavior.scene, "time": behavior.time}


def _contribution(one: Contribution) -> dict[str, Any]:
    return {**_behavior(one.behavior), "count": one.count, "logits": one.logits}
