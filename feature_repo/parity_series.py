"""The comparisons of a home over time: a line each, and metrics for Prometheus.

``metrics/parity.prom`` is for node_exporter's textfile collector: counters over all runs, gauges of
each profile's last one; ``longtrail_parity_*`` of comparisons of the stores,
``longtrail_served_parity_*`` of those of served requests.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from prometheus_client import CollectorRegistry, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import AwareDatetime, ValidationError

from feature_repo.home import Home
from feature_repo.manifest import Document

logger = logging.getLogger(__name__)

METRICS_FILE = "parity.prom"
_PREFIX = "longtrail_parity"
_SERVED_PREFIX = "longtrail_served_parity"


class ViewCounts(Document):
    """Of one view in one run; see :class:`feature_repo.parity.ViewParity`."""

    num_keys: int
    values: int
    mismatches: int
    missing_offline: int
    missing_online: int
    recomputed: int = 0

    @property
    def wrong(self) -> int:
        """Values that differ and rows that are missing."""
        return self.mismatches + self.missing_offline + self.missing_online


class ServedCounts(Document):
    """Of the served requests that a run replayed."""

    requests: int
    degraded: int
    """Not compared: their answers said themselves that something was missing."""
    without_model: int
    """Whose scores were not compared: their run is gone."""
    max_score_difference: float
    """Largest difference between a logged score and the one computed again."""


class ParityRun(Document):
    """A line of the time series."""

    time: AwareDatetime
    profile: str
    sample: int
    join: Literal["fast", "feast"]
    views: dict[str, ViewCounts]
    seconds: float
    served: ServedCounts | None = None
    """None where the two stores were compared; else the log of served requests with the offline
    store, "online" in the counts being what was served."""


def parity_runs(home: Home) -> list[ParityRun]:
    """The time series, oldest first; a line that a full disk cut short is left out."""
    if not home.parity_runs.exists():
        return []
    runs = []
    for number, line in enumerate(
        home.parity_runs.read_text(encoding="utf-8").splitlines(), start=1
    ):
        try:
            runs.append(ParityRun.model_validate_json(line))
        except ValidationError as error:
            logger.warning("%s, line %d is left out: %s", home.parity_runs, number, error)
    return runs


def record_run(home: Home, run: ParityRun) -> None:
    """Append a run to the time series, and write what that says now as Prometheus metrics."""
    _append(home.parity_runs, run)
    home.metrics.mkdir(exist_ok=True)
    registry = CollectorRegistry()
    runs = parity_runs(home)
    stores = [run for run in runs if run.served is None]
    registry.register(_ParityMetrics(_PREFIX, stores))
    served = [run for run in runs if run.served is not None]
    registry.register(_ParityMetrics(_SERVED_PREFIX, served))
    registry.register(_ServedMetrics(served))
    write_to_textfile(str(home.metrics / METRICS_FILE), registry)  # a whole file or the old one


def _append(path: Path, run: ParityRun) -> None:
    """Add a line with one write, behind the end of whatever line is there."""
    with path.open("ab+") as file:
        is_cut = False
        if file.tell():
            file.seek(-1, 2)
            is_cut = file.read(1) != b"\n"
        file.write(b"\n" * is_cut + run.model_dump_json().encode() + b"\n")


class _ParityMetrics(Collector):
    """Counters over all runs, gauges of each profile's last one."""

    def __init__(self, prefix: str, runs: Sequence[ParityRun]) -> None:
        self._prefix = prefix
        self._runs = runs

    def collect(self) -> Iterable[Metric]:
        labels = ("view", "profile")
        compared = CounterMetricFamily(
            f"{self._prefix}_values", "Values compared, over all runs.", labels=labels
        )
        sums: Counter[tuple[str, str]] = Counter()
        for run in self._runs:
            sums.update({(name, run.profile): view.values for name, view in run.views.items()})
        for of, number in sums.items():
            compared.add_metric(of, number)
        yield compared
        last = {run.profile: run for run in self._runs}
        for name, help_text in (
            ("num_keys", "Keys that the last run looked up."),
            ("mismatches", "Values that differed in the last run."),
            ("missing_offline", "Keys that the last run found online only."),
            ("missing_online", "Keys that the last run found offline only."),
        ):
            gauge = GaugeMetricFamily(
                f"{self._prefix}_{name.removeprefix('num_')}", help_text, labels=labels
            )
            for profile, run in last.items():
                for view, counts in run.views.items():
                    gauge.add_metric((view, profile), getattr(counts, name))
            yield gauge
        times = GaugeMetricFamily(
            f"{self._prefix}_last_run_timestamp_seconds", "When the last run began.", labels=labels
        )
        seconds = GaugeMetricFamily(
            f"{self._prefix}_last_run_duration_seconds", "How long it took.", labels=("profile",)
        )
        for profile, run in last.items():
            for view in run.views:
                times.add_metric((view, profile), run.time.timestamp())
            seconds.add_metric((profile,), run.seconds)
        yield from (times, seconds)


class _ServedMetrics(Collector):
    """Of each profile's last replay of served requests."""

    def __init__(self, runs: Sequence[ParityRun]) -> None:
        self._last = {run.profile: run.served for run in runs if run.served is not None}

    def collect(self) -> Iterable[Metric]:
        for name, help_text in (
            ("requests", "Served requests that the last run looked at."),
            ("degraded", "Of those, degraded ones, which were not compared."),
            ("without_model", "Of those, requests whose run is gone: their scores were not."),
            ("max_score_difference", "Largest difference of a score when computed again."),
        ):
            gauge = GaugeMetricFamily(f"{_SERVED_PREFIX}_{name}", help_text, labels=("profile",))
            for profile, served in self._last.items():
                gauge.add_metric((profile,), getattr(served, name))
            yield gauge
