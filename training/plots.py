"""Plots for the report, as SVG that stands in the page: its text and lines take the page's colour.

Shapes: R = rows, P = points.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from encoders.drawing import BROAD, COLORS, INK, svg
from training.bootstrap import Labels, Scores
from training.metrics import calibration_bins

_CURVE_POINTS = 200


def reliability(labels: Labels, chances: Mapping[str, Scores]) -> str:
    """Click rate against mean probability in ten bins of equal mass.

    Args:
        labels: [R], 0 or 1.
        chances: Name -> probabilities [R].
    """

    def draw(axes: Sequence[Axes]) -> None:
        (ax,) = axes
        highest = 0.0
        for color, (name, values) in zip(COLORS, chances.items(), strict=False):
            means, rates, _ = calibration_bins(labels, values)
            highest = max([highest, *means, *rates])
            ax.plot(means, rates, "o-", color=color, label=name, markersize=4)
        ax.plot([0, highest], [0, highest], ":", color=INK, linewidth=1, label="perfect")
        ax.set_xlabel("mean probability")
        ax.set_ylabel("click rate")
        ax.legend()

    return svg("reliability", draw)


def bins(name: str, before: Sequence[int], now: Sequence[int]) -> str:
    """Shares of the rows in the same bins, then and now, beside each other.

    Args:
        name: Unique in the page.
        before: Rows per bin, the missing ones last.
        now: The same of later rows.
    """

    def draw(axes: Sequence[Axes]) -> None:
        (ax,) = axes
        places = np.arange(len(before))
        for shift, color, label, counts in (
            (-0.2, COLORS[0], "training", before),
            (0.2, COLORS[1], "window", now),
        ):
            shares = np.array(counts) / max(sum(counts), 1)
            ax.bar(places + shift, shares, 0.4, color=color, label=label)
        ax.set_xlabel("bin")
        ax.set_ylabel("share of the rows")
        ax.legend()

    return svg(name, draw)


def roc(labels: Labels, chances: Mapping[str, Scores]) -> str:
    """Share of clicked rows found against the share of others taken for clicked.

    Args:
        labels: [R], 0 or 1; with both classes.
        chances: Name -> probabilities [R].
    """

    def draw(axes: Sequence[Axes]) -> None:
        (ax,) = axes
        grid = np.linspace(0, 1, _CURVE_POINTS)
        for color, (name, values) in zip(COLORS, chances.items(), strict=False):
            false_rate, true_rate, _ = roc_curve(labels, values)
            ax.plot(grid, np.interp(grid, false_rate, true_rate), color=color, label=name)
        ax.plot([0, 1], [0, 1], ":", color=INK, linewidth=1)
        ax.set_xlabel("share of rows without click above the threshold")
        ax.set_ylabel("share of clicked rows above it")
        ax.legend()

    return svg("roc", draw)


def lift_by_decile(labels: Labels, chances: Scores) -> NDArray[np.float64]:
    """Click rate of each tenth of the rows over the overall rate, the highest scores first.

    Args:
        labels: [R], 0 or 1, with a click among them.
        chances: [R].

    Returns:
        [10], or fewer where there are fewer rows.
    """
    _, rates, _ = calibration_bins(labels, chances, num_bins=10)
    return rates[::-1] / float(labels.mean())


def lift(labels: Labels, chances: Scores) -> str:
    """Bars of :func:`lift_by_decile`."""

    def draw(axes: Sequence[Axes]) -> None:
        (ax,) = axes
        values = lift_by_decile(labels, chances)
        ax.bar(np.arange(1, len(values) + 1), values, color=COLORS[0])
        ax.axhline(1, color=INK, linewidth=1, linestyle=":")
        ax.set_xticks(range(1, len(values) + 1))
        ax.set_xlabel("tenth of the rows, highest scores first")
        ax.set_ylabel("click rate over the mean rate")

    return svg("lift", draw)


def points(
    name: str,
    labels: Sequence[str],
    values: Sequence[float],
    bounds: Sequence[tuple[float, float]],
    *,
    ylabel: str,
    zero: bool = False,
) -> str:
    """Values with their intervals, one beside the other.

    Args:
        name: Unique in the page.
        labels: P names.
        values: P.
        bounds: P times (low, high).
        ylabel: What the values are.
        zero: Draw bars from a line at 0, for differences.
    """

    def draw(axes: Sequence[Axes]) -> None:
        (ax,) = axes
        places = np.arange(len(values))
        middle = np.asarray(values, dtype=np.float64)
        low, high = np.asarray(bounds, dtype=np.float64).reshape(-1, 2).T
        # A percentile interval need not hold the value itself: then there is no arm on that side.
        arms = np.maximum([middle - low, high - middle], 0)
        if zero:
            ax.bar(places, middle, color=COLORS[0])
            ax.axhline(0, color=INK, linewidth=1)
        ax.errorbar(
            places,
            middle,
            yerr=arms,
            fmt="none" if zero else "o-",
            color=INK if zero else COLORS[0],
            ecolor=INK,
            capsize=3,
        )
        ax.set_xticks(places, labels, rotation=20, ha="right")
        ax.set_ylabel(ylabel)

    return svg(name, draw, width=BROAD)


def training_curves(validations: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Losses and validation AUC by step.

    Args:
        validations: Run -> entries with step, train_loss, valid_logloss and valid_auc.
    """

    def draw(axes: Sequence[Axes]) -> None:
        losses, ranking = axes
        for index, (run, entries) in enumerate(validations.items()):
            color = COLORS[index % len(COLORS)]
            steps = [entry["step"] for entry in entries]
            for key, line in (("train_loss", "o:"), ("valid_logloss", "o-")):
                losses.plot(
                    steps,
                    _numbers(entries, key),
                    line,
                    color=color,
                    markersize=3,
                    label=f"{run}" if key == "valid_logloss" else None,
                )
            ranking.plot(
                steps, _numbers(entries, "valid_auc"), "o-", color=color, markersize=3, label=run
            )
        losses.set_xlabel("step")
        losses.set_ylabel("logloss (dotted: training)")
        ranking.set_xlabel("step")
        ranking.set_ylabel("validation AUC")
        ranking.legend(fontsize=8)

    return svg("training", draw, panels=2, width=BROAD)


def _numbers(entries: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """A figure by entry; NaN, which is not drawn, where it was not defined."""
    return [np.nan if entry.get(key) is None else float(entry[key]) for entry in entries]
