"""Served requests computed again: their features from the offline store, their scores from those.

The feature half is :mod:`feature_repo.served_parity`; the scores need the models.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import partial

import numpy as np
from numpy.typing import NDArray

from encoders.loaded_artifact import load_artifact
from encoders.table import EmbeddingTable
from feature_repo.columns import Columns
from feature_repo.errors import ArtifactError, EncoderError
from feature_repo.home import Home
from feature_repo.parity import ParityReport, ViewParity
from feature_repo.parity_series import ParityRun, ServedCounts, record_run
from feature_repo.progress import Progress, silent
from feature_repo.reader import FeatureReader
from feature_repo.served_parity import Replayed, ServedViews, replay, requests_of, sample_ids
from feature_repo.served_rows import ServedRequest
from feature_repo.view_reader import Join
from serving.scoring import Scorer

SCORES = "scores"
"""Stands among the views for the scores."""
TOLERANCE = 1e-5
"""Largest difference of a probability that counts as equal: the items come in other batches."""
_CHUNK_ITEMS = 2048

_log = logging.getLogger(__name__)


@dataclass
class ScoreReplay:
    """Scores computed again by the run's program from the offline store's features.

    Args:
        open_scorer: Opens a run's program, as :func:`open_scorer` does.
        parity: The comparison so far.
        without_model: Requests whose run, or its vectors, is gone.
        max_difference: Largest difference of a score, in [0, 1].
    """

    open_scorer: Callable[[str], Scorer]
    parity: ViewParity = field(default_factory=ViewParity)
    without_model: int = 0
    max_difference: float = 0.0
    _scorers: dict[str, Scorer | None] = field(default_factory=dict)

    def compare(self, replayed: Replayed) -> None:
        """Add a request that was not degraded.

        Raises:
            ArtifactError: If the feature store lacks what the model reads.
        """
        request = replayed.request
        scorer = self._scorer(request.run)
        if scorer is None:
            self.without_model += 1
            return
        logits = scorer.logits(
            scorer.user_side(replayed.user), scorer.item_side(replayed.items), request.context
        )
        served, again = _sigmoid(request.items.logits), _sigmoid(logits)
        differences = np.nan_to_num(np.abs(again - served), nan=1.0)  # no score where one was
        self.max_difference = max(self.max_difference, float(differences.max(initial=0.0)))
        # Within the tolerance is equal; beyond it, both are told as they are.
        again = np.where(differences <= TOLERANCE, served, again)
        keys = [f"{item_id} (request {request.request_id})" for item_id in request.items.item_ids]
        there = np.ones(len(keys), dtype=bool)
        self.parity.compare(
            np.array(keys, dtype=object),
            Columns(there, {"score": again}),
            Columns(there, {"score": served}),
        )

    def _scorer(self, run: str) -> Scorer | None:
        if run not in self._scorers:
            try:
                self._scorers[run] = self.open_scorer(run)
            except (ArtifactError, EncoderError) as error:
                self._scorers[run] = None
                _log.warning("scores of run %s are not compared: %s", run, error)
        return self._scorers[run]


def open_scorer(home: Home, run: str) -> Scorer:
    """Open the program of a run in ``home`` with the vectors that it was trained on.

    Raises:
        ArtifactError: If the run is gone or cannot be loaded.
        EncoderError: If the vectors are gone.
    """
    artifact = load_artifact(home, run)
    table = EmbeddingTable.open(home, fingerprint=artifact.manifest.encoder_fingerprint)
    return Scorer(artifact, table, chunk_size=_CHUNK_ITEMS)


@dataclass(frozen=True)
class ServedReport(ParityReport):
    """Outcome of a replay; :data:`SCORES` is among the views."""

    counts: ServedCounts


def check_served(
    home: Home,
    profile: str,
    *,
    sample: int,
    join: Join = "feast",
    since: date | None = None,
    progress: Progress = silent,
) -> ServedReport:
    """Compare what served requests were answered from, and their scores, with the offline store.

    The outcome is appended to the home's time series and replaces its Prometheus file.

    Args:
        home: The data set.
        profile: Which stores.
        sample: Requests taken from the log, the same ones every time.
        join: How offline rows are found: by Feast's own join, or by the fast one of training.
        since: First day of the log, UTC; None for all.
        progress: Receives requests.

    Raises:
        MissingStepError: If nothing was ever logged, or a step before was not run.
        NothingToCompareError: If nothing was logged since the first day.
        StoreError: If the offline store fails.
        ArtifactError: If the feature store lacks what a model reads.
    """
    began, moment = time.perf_counter(), datetime.now(UTC)
    wanted = sample_ids(home, sample, since=since)
    reader = FeatureReader(home, profile)
    features, scores = ServedViews(home, reader), ScoreReplay(partial(open_scorer, home))
    num_requests = num_degraded = 0

    def whole() -> Iterator[ServedRequest]:
        nonlocal num_requests, num_degraded
        for request in requests_of(home, wanted, since=since):
            num_requests += 1
            num_degraded += bool(request.degraded)
            progress(1, len(wanted))
            if not request.degraded:
                yield request

    for replayed in replay(reader, whole(), join=join):
        features.compare(replayed)
        scores.compare(replayed)
    report = ServedReport(
        views={**dict(sorted(features.views.items())), SCORES: scores.parity},
        seconds=time.perf_counter() - began,
        counts=ServedCounts(
            requests=num_requests,
            degraded=num_degraded,
            without_model=scores.without_model,
            max_score_difference=scores.max_difference,
        ),
    )
    run = ParityRun(
        time=moment,
        profile=profile,
        sample=sample,
        join=join,
        views={name: view.counts for name, view in report.views.items()},
        seconds=round(report.seconds, 3),
        served=report.counts,
    )
    record_run(home, run)
    return report


def _sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    # Through tanh, which does not overflow.
    return np.asarray(0.5 + 0.5 * np.tanh(0.5 * logits.astype(np.float64)))
