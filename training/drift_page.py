"""A comparison of features with those of training, as one HTML file."""

from collections.abc import Mapping
from pathlib import Path

from encoders.page import Plot, Section, Table, write_page
from feature_repo.drift import FeatureDrift
from feature_repo.view_statistics import ViewStatistics
from training import plots
from training.drift import WindowDrift

_SHOWN = 6
"""Features of which the bins are drawn."""


def write_drift_page(
    path: Path, found: WindowDrift, views: Mapping[str, ViewStatistics], *, threshold: float
) -> None:
    """Write the page.

    Args:
        path: The HTML file.
        found: The comparison.
        views: View -> its rows in the window.
        threshold: Above which a feature has drifted.
    """
    window, drifted = found.window, found.drift.drifted
    if drifted:
        verdict = f"{len(drifted)} past the threshold of {threshold:g}: {', '.join(drifted)}"
    else:
        verdict = f"Nothing is past the threshold of {threshold:g}."
    write_page(
        path,
        title=f"Drift against the training rows of {found.run}",
        subtitle=f"{window.num_rows:,} impressions of {window.num_contexts:,} contexts from "
        f"{found.start:%Y-%m-%d %H:%M} to {found.end:%Y-%m-%d %H:%M} UTC, against "
        f"{found.reference.num_rows:,} of {found.reference.start:%Y-%m-%d} to "
        f"{found.reference.end:%Y-%m-%d}.",
        notes=[verdict],
        sections=[
            Section("Farthest", plots=_plots(found)),
            Section(
                "Features",
                text="View: the feature view that it is of; without one it is made in the request. "
                "PSI: population stability index over deciles of the training rows; below 0.1 "
                "is none, above 0.2 is drift. By chance: what equal distributions of these sizes "
                "hardly exceed.",
                tables=[
                    Table(
                        group,
                        [
                            *("feature", "view", "PSI", "by chance"),
                            *("missing before", "missing now", "drifted"),
                        ],
                        [_row(name, feature) for name, feature in features.items()],
                    )
                    for group, features in found.drift.features.items()
                    if features
                ],
            ),
            Section(
                "Mean vectors of the texts that were read",
                tables=[
                    Table(
                        "Cosine distance, 0 (one direction) to 2",
                        ["texts", "distance"],
                        [[kind, _number(far)] for kind, far in found.drift.vectors.items()],
                    )
                ],
            ),
            Section(
                "Views",
                text="Rows that came in the window, as Feast's monitor counts them.",
                tables=[
                    Table(
                        "Rows by view",
                        [
                            "view",
                            "rows",
                            "age of the newest at its end, days",
                            "most often missing",
                        ],
                        [[name, *_view_cells(view)] for name, view in views.items()],
                    )
                ],
            ),
        ],
    )


def _plots(found: WindowDrift) -> list[Plot]:
    far = sorted(
        (
            (feature.psi, group, name)
            for group, features in found.drift.features.items()
            for name, feature in features.items()
        ),
        reverse=True,
    )[:_SHOWN]
    result = []
    for value, group, name in far:
        before = found.reference.distributions[group][name].counts
        now = found.window.distributions[group][name].counts
        result.append(
            Plot(
                plots.bins(f"{group}-{name}", before, now),
                f"{group}.{name}: PSI {value:.3f}. The last bin is missing values.",
                f"Shares of the bins of {group}.{name} in training and in the window.",
            )
        )
    return result


def _row(name: str, feature: FeatureDrift) -> list[str]:
    return [
        name,
        feature.view or "",
        _number(feature.psi),
        _number(feature.by_chance),
        _percent(feature.missing_before),
        _percent(feature.missing_now),
        "yes" if feature.drifted else "",
    ]


def _view_cells(view: ViewStatistics) -> list[str]:
    worst = max(view.missing.items(), key=lambda item: item[1], default=None)
    return [
        f"{view.num_rows:,}",
        "n/a" if view.age_days is None else f"{view.age_days:.2f}",
        f"{worst[0]} {worst[1]:.1%}" if worst and worst[1] else "",
    ]


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2%}"
