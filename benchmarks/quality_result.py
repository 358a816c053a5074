"""What the quality benchmark tells: the figures of every model, and what one has above another."""

from collections.abc import Mapping
from typing import Any

from benchmarks.quality_plan import GIVEN, SINGLE, TOGETHER, TREES, rival_of
from training.ablations import FULL
from training.evaluate import Evaluation

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
        "extra_rows": {
            name: differences[name, name + GIVEN]
            for name in (SINGLE, rival)
            if (name, name + GIVEN) in differences
        },
        "models": {name: figures(evaluation) for name, evaluation in models.items()},
        "ablations": {
            name: {
                **figures(evaluation),
                "against_full": compared(evaluation) if name != FULL else {},
            }
            for name, evaluation in ablations.items()
        },
    }
