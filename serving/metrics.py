"""What the service tells Prometheus, under one prefix; see docs/serving.md for what to watch.

Every :class:`Metrics` has a registry of its own. Where several workers serve, prometheus_client
keeps the values in files of one folder (:mod:`serving.metrics_folder`), and whichever worker is
asked adds them up.
"""

import threading
from collections.abc import Sequence
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from feature_repo.artifact import ArtifactManifest
from serving.answers import Ranking
from serving.events import EventReceipt

PREFIX = "longtrail_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_MS = 1e-3
_DAY_S = 86_400.0
LATENCY_BUCKETS = tuple(
    ms * _MS for ms in (0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 100, 200, 500, 1000)
)
AGE_BUCKETS = (1, 60, 3600, *(days * _DAY_S for days in (1, 3, 7, 14, 30, 90, 180, 365)))
SHARE_BUCKETS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
CORRELATION_BUCKETS = (-0.5, 0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
DIFFERENCE_BUCKETS = (1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)


class Metrics:
    """All metrics of one process.

    Args:
        folder: Where the workers of one service keep their values; None for a single process.
    """

    def __init__(self, folder: Path | None = None) -> None:
        # They are a second series for each one, which nobody asks for.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._folder = folder
        registry = self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=registry)

        def histogram(
            name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()
        ) -> Histogram:
            return Histogram(PREFIX + name, text, labels, buckets=buckets, registry=registry)

        # Requests.
        self.requests = counter(
            "requests_total", "Answered requests", ("route", "method", "status")
        )
        self.request_seconds = histogram(
            "request_seconds", "Time to the whole answer", LATENCY_BUCKETS, ("route", "method")
        )
        self.in_flight = Gauge(
            PREFIX + "requests_in_flight",
            "Requests that are being answered or wait for it",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.refused = counter(
            "requests_refused_total",
            "Requests that were turned away: overloaded, rate, key, scope, body or host",
            ("reason",),
        )
        # Rankings.
        self.rankings = counter(
            "rankings_total", "Rankings by where the user's deep outputs came from", ("path",)
        )
        self.stage_seconds = histogram(
            "rank_stage_seconds", "Time of a stage of a ranking", LATENCY_BUCKETS, ("stage",)
        )
        self.feature_age = histogram(
            "feature_age_seconds", "Seconds since the newest behaviour of the user", AGE_BUCKETS
        )
        self.missing_rate = histogram(
            "missing_features_ratio",
            "Share of the user's features that were missing",
            SHARE_BUCKETS,
        )
        self.cold_starts = counter(
            "cold_starts_total", "Rankings of users whom the store does not know"
        )
        self.degraded = counter(
            "degraded_total", "Answers that were worse than they could be", ("kind",)
        )
        self.unknown_items = counter(
            "unknown_items_total", "Candidates that the store does not know"
        )
        # Live events.
        self.events = counter(
            "events_total", "Posted events: accepted, duplicate or rejected", ("outcome",)
        )
        # The online store and the log of served features.
        self.store_open = Gauge(
            PREFIX + "store_breaker_open",
            "1 while the online store is left alone because it failed",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.store_failures = counter(
            "store_failures_total", "Reads of the online store that failed or were too slow"
        )
        self.served_log = counter(
            "served_log_requests_total", "Logged requests: written or dropped", ("outcome",)
        )
        # The model.
        self.model_info = Gauge(
            PREFIX + "model_info",
            "1 for the run that is served",
            ("run", "recipe", "dataset", "encoder"),
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.model_loads = counter(
            "model_loads_total", "Models that were to be served: loaded or failed", ("outcome",)
        )
        # The shadow model.
        self.shadow = counter(
            "shadow_total", "Rankings of the shadow: compared, dropped or failed", ("outcome",)
        )
        self.shadow_difference = histogram(
            "shadow_score_difference", "Mean absolute difference of scores", DIFFERENCE_BUCKETS
        )
        self.shadow_overlap = histogram(
            "shadow_top_overlap_ratio", "Share of the top items that both rank", SHARE_BUCKETS
        )
        self.shadow_correlation = histogram(
            "shadow_rank_correlation", "Spearman's, of the items that both scored",
            CORRELATION_BUCKETS,
        )  # fmt: skip
        self._served: tuple[str, ...] | None = None

    def observe_ranking(self, ranking: Ranking) -> None:
        """Count a ranking."""
        self.rankings.labels(ranking.path).inc()
        for stage, seconds in ranking.seconds.items():
            self.stage_seconds.labels(stage).observe(seconds)
        if ranking.feature_age_s is not None:
            self.feature_age.observe(ranking.feature_age_s)
        if ranking.missing_rate is not None:
            self.missing_rate.observe(ranking.missing_rate)
        if not ranking.known:
            self.cold_starts.inc()
        if ranking.unknown_items:
            self.unknown_items.inc(len(ranking.unknown_items))
        for sentence in ranking.degraded:
            self.degraded.labels(degraded_kind(sentence)).inc()

    def observe_events(self, receipt: EventReceipt) -> None:
        """Count what became of posted events."""
        self.events.labels("accepted").inc(receipt.accepted)
        self.events.labels("duplicate").inc(receipt.duplicates)
        self.events.labels("rejected").inc(len(receipt.rejected))

    def serve_model(self, manifest: ArtifactManifest) -> None:
        """Name the model that is served from now on."""
        if self._served is not None:
            self.model_info.labels(*self._served).set(0)
        self._served = (
            manifest.run,
            manifest.recipe,
            manifest.dataset,
            manifest.encoder_fingerprint,
        )
        self.model_info.labels(*self._served).set(1)

    def text(self) -> bytes:
        """All values in Prometheus' text format, of all workers where there are several."""
        if self._folder is None:
            return generate_latest(self.registry)
        registry = CollectorRegistry()
        registry.register(_OwnMetrics(self._folder))
        return generate_latest(registry)


class Rising:
    """Brings a counter up to a number that something else counts; safe for threads.

    Args:
        counter: Of one set of labels.
    """

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._last = 0
        self._lock = threading.Lock()

    def to(self, number: int) -> None:
        """Add what is new since the last time; a smaller number, read before the last one, is 0."""
        with self._lock:
            if number > self._last:
                self._counter.inc(number - self._last)
                self._last = number


class _OwnMetrics(Collector):
    """What the workers wrote, without what other libraries (Feast) keep in the same folder."""

    def __init__(self, folder: Path) -> None:
        self._all = MultiProcessCollector(None, path=str(folder))  # type: ignore[no-untyped-call]

    def collect(self):  # type: ignore[no-untyped-def]  # prometheus_client's own
        metrics = self._all.collect()  # type: ignore[no-untyped-call]
        return [metric for metric in metrics if metric.name.startswith(PREFIX)]


def forget_worker(folder: Path, process_id: int) -> None:
    """Take a worker that is gone out of the gauges; what it counted stays."""
    mark_process_dead(process_id, path=str(folder))  # type: ignore[no-untyped-call]


def degraded_kind(sentence: str) -> str:
    """The part of a sentence on degradation that is the same for every user: before the colon."""
    return sentence.partition(":")[0]
