"""The result of the quality benchmark as Markdown: the tables of the README, word for word."""

from collections.abc import Mapping
from typing import Any

from benchmarks.quality_plan import GIVEN, SINGLE, TOGETHER, TREES
from benchmarks.quality_result import Compared
from benchmarks.quality_tables import bullets, difference_tables, models_table
from training.ablations import FULL


def page(found: Mapping[str, Any]) -> str:
    """Models, their differences, and these on the slices that the first two tables leave out.

    Args:
        found: What a result file holds, also one written before a comparison or an interval was
            added; ablations and models on the given rows alone may be missing.
    """
    differences = _differences(found)
    caption = (
        f"{found['dataset']}, {found['rows']} rows, vectors of encoder `{found['encoder']}`. "
        f"`{SINGLE}` is the mean of {found['num_seeds']} seeds, all else has one; an ablation is "
        "compared with the first seed. 95 % intervals by bootstrap over users, those of "
        "differences on the same draws; a difference of logloss below 0 is better."
    )
    parts = [
        caption,
        models_table(found["models"], bold=(SINGLE, TOGETHER)),
        *difference_tables(differences),
    ]
    return "\n\n".join([*parts, *bullets(found["notes"])])


def _differences(found: Mapping[str, Any]) -> dict[str, Compared]:
    """Label -> difference, of those that were measured; without LightGBM two of them are one."""
    rival = found["comparison"]["trees"]
    comparison, downstream, given_rows = (
        found.get(key, {}) for key in ("comparison", "downstream", "given_rows")
    )
    named: dict[str, Compared] = {
        f"`{SINGLE}` - `{rival}`": comparison["by_slice"],
        f"`{TOGETHER}` - `{rival}`": downstream["by_slice"],
        f"`{SINGLE}` - `{TREES}`": comparison.get("against_trees", {}),
        f"`{TOGETHER}` - `{TREES}`": downstream.get("against_trees", {}),
    }
    for name, values in found.get("extra_rows", {}).items():
        named[f"`{name}` - `{name}{GIVEN}`"] = values
    named[f"`{SINGLE}{GIVEN}` - `{rival}{GIVEN}`"] = given_rows.get("by_slice", {})
    for name, values in found["ablations"].items():
        if name != FULL:
            named[f"`{SINGLE}` {name.replace('-', ' ')} - whole"] = values["against_full"]
    return {label: values for label, values in named.items() if values}
