"""What the quality benchmark tells: the figures of every model, and what one has above another."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.quality_plan import (
    FULL_TEXT,
    GIVEN,
    SAME_BUDGET,
    SINGLE,
    TOGETHER,
    TREES,
    rival_of,
)
from training.ablations import FULL
from training.evaluate import Evaluation

INTERVALS = ("auc", "gauc", "logloss")
"""Figures that have one."""
SLICES = ("novel", "cold_items", "history_1_20")
"""Those fixed beforehand, on which texts should matter."""

Compared = dict[str, dict[str, dict[str, float | None]]]
"""``all`` or slice -> figure -> ``difference``, ``low``, ``high``."""


def figures(evaluation: Evaluation) -> dict[str, Any]:
    """All figures of one model with their intervals, on all rows and on every slice."""
    return {"runs": evaluation.runs, **evaluation.metrics, "slices": evaluation.slices}


def compared(evaluation: Evaluation) -> Compared:
    """What an evaluation found against the other side."""
    return {
        rows: {
            figure: {key: values[key] for key in ("difference", "low", "high")}
            for figure, values in by_figure.items()
        }
        for rows, by_figure in evaluation.comparison.items()
    }


def result(
    models: Mapping[str, Evaluation],
    pairs: Mapping[tuple[str, str], Evaluation],
    ablations: Mapping[str, Evaluation],
) -> dict[str, Any]:
    """The figures of the result file.

    Args:
        models: Model -> its figures.
        pairs: Those of :func:`benchmarks.quality_plan.compared_models` -> the first one's figures,
            compared with the second's.
        ablations: Variant -> its figures, compared with the full model's; empty = not studied.
    """
    rival = rival_of(models)
    best = pairs[SINGLE, rival].comparison["all"]["auc"]
    differences = {pair: compared(evaluation) for pair, evaluation in pairs.items()}
    given = differences.get((SINGLE + GIVEN, rival + GIVEN))
    full_text = differences.get((SAME_BUDGET, FULL_TEXT))
    return {
        "comparison": {
            "lightgbm_auc": best["second"],
            "best_auc": best["first"],
            **{key: best[key] for key in ("difference", "low", "high")},
            "trees": rival,
            "by_slice": differences[SINGLE, rival],
            "against_trees": differences[SINGLE, TREES],
        },
        "downstream": {
            "together": TOGETHER,
            "by_slice": differences[TOGETHER, rival],
            "against_trees": differences[TOGETHER, TREES],
        },
        "given_rows": {"by_slice": given} if given else {},
        "full_text": {"by_slice": full_text} if full_text else {},
        "models": {name: figures(evaluation) for name, evaluation in models.items()},
        "ablations": {
            name: {
                **figures(evaluation),
                "against_full": compared(evaluation) if name != FULL else {},
            }
            for name, evaluation in ablations.items()
        },
    }


def table(found: Mapping[str, Any]) -> str:
    """The models as a table for people, then the differences.

    Args:
        found: Of :func:`result`.
    """
    head = "".join(f"{f'{figure}, 95 % interval':<26}" for figure in ("AUC", "GAUC", "logloss"))
    lines = [f"{'model':<26}{head}".rstrip()]
    for name, values in found["models"].items():
        row = f"{name:<26}"
        for figure in INTERVALS:
            low, high = values[f"{figure}_low"], values[f"{figure}_high"]
            row += f"{f'{values[figure]:.4f} [{low:.4f}, {high:.4f}]':<26}"
        lines.append(row.rstrip())
    lines += [
        f"{label}, {rows}, {figure}: {values['difference']:+.4f} "
        f"[{values['low']:+.4f}, {values['high']:+.4f}]"
        for label, differences in _differences(found).items()
        for rows, figure, values in _shown(differences)
    ]
    return "\n".join(lines)


def _differences(found: Mapping[str, Any]) -> dict[str, Compared]:
    """What stands below the table, by label; without LightGBM two of them are one."""
    rival = found["comparison"]["trees"]
    named = {
        f"{SINGLE} - {rival}": found["comparison"]["by_slice"],
        f"{SINGLE} - {TREES}": found["comparison"]["against_trees"],
        f"{TOGETHER} - {rival}": found["downstream"]["by_slice"],
        f"{TOGETHER} - {TREES}": found["downstream"]["against_trees"],
        f"{SINGLE}{GIVEN} - {rival}{GIVEN}": found["given_rows"].get("by_slice", {}),
        f"{SAME_BUDGET} - {FULL_TEXT}": found["full_text"].get("by_slice", {}),
    }
    return named | {
        f"{name} - {FULL}": values["against_full"] for name, values in found["ablations"].items()
    }


def _shown(differences: Compared) -> Iterator[tuple[str, str, dict[str, float | None]]]:
    """Every figure on all rows, AUC on the slices; rows, figure, values where they are defined."""
    for rows, by_figure in differences.items():
        for figure, values in by_figure.items():
            wanted = rows == "all" or (rows in SLICES and figure == "auc")
            if wanted and values["low"] is not None:
                yield rows, figure, values
