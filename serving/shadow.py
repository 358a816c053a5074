"""A model in the shadow: it ranks a share of the requests too, and only differences are kept.

It runs in a thread of its own behind a short queue. Requests never wait for it: what it cannot keep
up with is dropped and counted, and its failures are its own.
"""

import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from feature_repo.errors import LongtrailError
from serving.answers import Ranking
from serving.metrics import Metrics
from serving.question import Question, ServingRanker

MAX_QUEUE = 32
"""Rankings that wait, each with what it was computed from: up to 1 MB for 1000 candidates."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Difference:
    """How two rankings of one request differ.

    Args:
        score: Mean absolute difference of the scores of the items that both scored; None where
            there is none.
        overlap: Share of the items in the answer that are in the shadow's too, in [0, 1].
        correlation: Spearman's rank correlation of the items that both scored, in [-1, 1]; None for
            fewer than two, or where one model tells none apart.
    """

    score: float | None
    overlap: float
    correlation: float | None


class Shadow:
    """Compares a model with the one that serves.

    Args:
        ranker: Of that model; warmed up.
        share: Part of the rankings that it repeats, in (0, 1].
        metrics: Where differences are counted.
        max_queue: Rankings that may wait for it, at least 1.

    Raises:
        LongtrailError: If a number is out of its range.
    """

    def __init__(
        self, ranker: ServingRanker, *, share: float, metrics: Metrics, max_queue: int = MAX_QUEUE
    ) -> None:
        if not 0 < share <= 1:
            raise LongtrailError(f"the share of the shadow must be in (0, 1], got {share}")
        if max_queue < 1:
            raise LongtrailError(f"max_queue must be at least 1, got {max_queue}")
        self._ranker = ranker
        self._share = share
        self._metrics = metrics
        self._max_waiting = max_queue + 1  # the one that is being ranked
        self._lock = threading.Lock()
        self._due = 0.0
        self._num_waiting = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shadow")

    @property
    def run(self) -> str:
        """Name of the run in the shadow."""
        return self._ranker.manifest.run

    def offer(self, question: Question, ranking: Ranking) -> None:
        """Put a question that was answered to the shadow too, if it is its turn and there is room.

        Args:
            question: What was asked.
            ranking: The answer, of the model that serves.
        """
        with self._lock:
            self._due += self._share  # every tenth of a share of 0.1, whatever the requests are
            if self._due < 1:
                return
            self._due -= 1
            has_room = self._num_waiting < self._max_waiting
            self._num_waiting += has_room
        if has_room:
            future = self._thread.submit(self._compare, question, ranking)
            future.add_done_callback(self._tell)
        else:
            self._metrics.shadow.labels("dropped").inc()

    def close(self) -> None:
        """End the thread; what waits is not ranked any more."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _compare(self, question: Question, ranking: Ranking) -> Difference:
        return compare(ranking, question.put_to(self._ranker, at=ranking.at))

    def _tell(self, future: Future[Difference]) -> None:
        with self._lock:
            self._num_waiting -= 1
        if future.cancelled():
            return
        error, metrics = future.exception(), self._metrics
        metrics.shadow.labels("failed" if error else "compared").inc()
        if error:
            _log.warning("run %s failed in the shadow: %s", self.run, error)
            return
        difference = future.result()
        metrics.shadow_overlap.observe(difference.overlap)
        if difference.score is not None:
            metrics.shadow_difference.observe(difference.score)
        if difference.correlation is not None:
            metrics.shadow_correlation.observe(difference.correlation)
        _log.info(
            "run %s in the shadow: overlap %.2f, score difference %s, rank correlation %s",
            *(self.run, difference.overlap),
            *(_said(difference.score), _said(difference.correlation)),
            extra={
                "shadow": self.run,
                "overlap": difference.overlap,
                "score_difference": difference.score,
                "rank_correlation": difference.correlation,
            },
        )


def compare(ranking: Ranking, shadow: Ranking) -> Difference:
    """Compare what two models made of one request."""
    ours, theirs = _scores(ranking), _scores(shadow)
    both = sorted(ours.keys() & theirs.keys())
    a = np.array([ours[item_id] for item_id in both])
    b = np.array([theirs[item_id] for item_id in both])
    top = {item.item_id for item in ranking.ranked}
    same = top & {item.item_id for item in shadow.ranked}
    return Difference(
        score=float(np.abs(a - b).mean()) if both else None,
        overlap=len(same) / len(top) if top else float(not shadow.ranked),
        correlation=_spearman(a, b),
    )


def _scores(ranking: Ranking) -> dict[str, float]:
    """Of all items that were scored, where the ranking tells; else of those in the answer."""
    if ranking.served is None:
        return {item.item_id: item.score for item in ranking.ranked}
    logits = ranking.served.logits.astype(np.float64)
    scores = 1 / (1 + np.exp(-logits))
    ids = ranking.served.items.item_ids
    return {
        str(i): float(score)
        for i, score in zip(ids, scores, strict=True)
        if not np.isnan(score)
    }  # fmt: skip


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    """Pearson's correlation of the ranks, equal values sharing their mean rank."""
    if len(a) < 2:
        return None
    ranks = rankdata(a), rankdata(b)
    if any(rank.std() == 0 for rank in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def _said(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
