"""The comparisons of a home over time: a line each, and metrics for Prometheus.

``metrics/parity.prom`` is for node_exporter's textfile collector: counters over all runs, gauges of
each profile's last one.
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


class ViewCounts(Document):
    """Of one view in one run; see :class:`feature_repo.parity.ViewParity`."""

    num_keys: int
    values: int
    mismatches: int
    missing_offline: int
    missing_online: int

    @property
    def wrong(self) -> int:
        """Values that differ and rows that are missing."""
        return self.mismatches + self.missing_offline + self.missing_online


class ParityRun(Document):
    """A line of the time series."""

    time: AwareDatetime
    profile: str
    sample: int
    join: Literal["fast", "feast"]
    views: dict[str, ViewCounts]
    seconds: float


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
    registry.register(_ParityMetrics(parity_runs(home)))
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

    def __init__(self, runs: Sequence[ParityRun]) -> None:
        self._runs = runs

    def collect(self) -> Iterable[Metric]:
        labels = ("view", "profile")
        compared = CounterMetricFamily(
            f"{_PREFIX}_values", "Values compared, over all runs.", labels=labels
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
                f"{_PREFIX}_{name.removeprefix('num_')}", help_text, labels=labels
            )
            for profile, run in last.items():
                for view, counts in run.views.items():
                    gauge.add_metric((view, profile), getattr(counts, name))
            yield gauge
        times = GaugeMetricFamily(
            f"{_PREFIX}_last_run_timestamp_seconds", "When the last run began.", labels=labels
        )
        seconds = GaugeMetricFamily(
            f"{_PREFIX}_last_run_duration_seconds", "How long it took.", labels=("profile",)
        )
        for profile, run in last.items():
            for view in run.views:
                times.add_metric((view, profile), run.time.timestamp())
            seconds.add_metric((profile,), run.seconds)
        yield from (times, seconds)
