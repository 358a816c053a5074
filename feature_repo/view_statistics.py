"""What the rows of each feature view look like in a window of event times, by Feast's own monitor.

Feast computes missing rates and means of scalar features inside the offline store. It knows whole
days only, fails on lists (sequences, vectors), and compares nothing: two of its histograms have
bins of their own. What needs lists or a comparison is :mod:`feature_repo.drift`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from feast import FeatureStore
from feast.monitoring.monitoring_service import MonitoringService
from feast.types import Array

from feature_repo.offline import open_offline, time_literal

_DAY_S = 86_400.0


@dataclass(frozen=True)
class ViewStatistics:
    """A view's rows with event times in a window.

    Args:
        num_rows: Rows of the window.
        age_days: From the newest row that is not later than the window's end up to that end, 0 or
            more; None where there is none.
        missing: Scalar feature -> share of the rows without a value, in the window's whole days.
        means: Numeric feature -> mean in the window's whole days; None where all are missing.
    """

    num_rows: int
    age_days: float | None
    missing: dict[str, float]
    means: dict[str, float | None]


def view_statistics(
    store: FeatureStore, views: Iterable[str], *, start: datetime, end: datetime
) -> dict[str, ViewStatistics]:
    """Ask the offline store.

    Args:
        store: Feast's store.
        views: Names of applied views; those without rows are left out.
        start: First moment of the window, UTC-aware.
        end: Its last moment.

    Raises:
        StoreError: If the store cannot be reached.
    """
    offline, monitor = open_offline(store), MonitoringService(store)
    question = (
        f"SELECT max(event_timestamp) FILTER (WHERE event_timestamp <= {time_literal(end)}), "  # noqa: S608
        "count(*) FILTER (WHERE event_timestamp BETWEEN "
        f"{time_literal(start)} AND {time_literal(end)}) FROM {{rows}}"
    )
    # Feast takes both days whole.
    days = {"start_date": start.date(), "end_date": (end - timedelta(microseconds=1)).date()}
    result = {}
    for name in views:
        if not offline.parts(name):
            continue
        newest, num_rows = offline.ask(name, question)
        view = store.get_feature_view(name)
        scalars = [field.name for field in view.features if not isinstance(field.dtype, Array)]
        metrics = []
        if scalars:  # no names would mean all features
            metrics = monitor.compute_transient(store.project, name, scalars, **days)["metrics"]
        result[name] = ViewStatistics(
            num_rows=int(num_rows),
            age_days=None if newest is None else (end - newest).total_seconds() / _DAY_S,
            missing={m["feature_name"]: m["null_rate"] for m in metrics},
            means={m["feature_name"]: m["mean"] for m in metrics if m["feature_type"] == "numeric"},
        )
    return result
