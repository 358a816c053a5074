"""Figures of click models as Markdown tables: those of the README and of the result pages."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from benchmarks.quality_result import SLICES, Compared
from benchmarks.results_file import markdown_table

ALL = "all"


class Column(NamedTuple):
    """A figure on some rows."""

    title: str
    rows: str
    """:data:`ALL` or a slice."""
    figure: str


MODEL_COLUMNS = (
    Column("AUC", ALL, "auc"),
    Column("GAUC", ALL, "gauc"),
    Column("logloss", ALL, "logloss"),
    Column("AUC, novel", "novel", "auc"),
    Column("AUC, cold items", "cold_items", "auc"),
)
DIFFERENCE_COLUMNS = (
    Column("AUC", ALL, "auc"),
    Column("AUC, novel", "novel", "auc"),
    Column("AUC, cold items", "cold_items", "auc"),
    Column("AUC, histories of 1 to 20", "history_1_20", "auc"),
    Column("GAUC", ALL, "gauc"),
    Column("logloss", ALL, "logloss"),
)


def models_table(models: Mapping[str, Mapping[str, Any]], *, bold: Iterable[str] = ()) -> str:
    """Models with their figures.

    Args:
        models: Model -> figures as :func:`benchmarks.quality_result.figures` gives them.
        bold: Models that stand out.
    """
    rows = []
    for name, values in models.items():
        cells = [f"`{name}`"]
        for column in MODEL_COLUMNS:
            of = values if column.rows == ALL else values["slices"].get(column.rows, {})
            cells.append(_figure(of, column.figure))
        if name in bold:
            number, _, bounds = cells[1].partition(" ")
            cells[:2] = [f"**{cells[0]}**", f"**{number}** {bounds}".rstrip()]
        rows.append(cells)
    return markdown_table(["Model", *(f"{c.title} [95 %]" for c in MODEL_COLUMNS)], rows)


def differences_table(
    differences: Mapping[str, Compared], columns: Iterable[Column] = DIFFERENCE_COLUMNS
) -> str:
    """Differences on the same rows, with intervals.

    Args:
        differences: Label, Markdown -> what was compared.
        columns: Figures to show.
    """
    columns = list(columns)
    rows = [
        [label, *(_difference(found.get(c.rows, {}).get(c.figure, {})) for c in columns)]
        for label, found in differences.items()
    ]
    return markdown_table(["Difference, same rows", *(c.title for c in columns)], rows)


def difference_tables(differences: Mapping[str, Compared]) -> list[str]:
    """The table of differences, and where there are more slices, one of their AUC."""
    others = _other_slices(differences)
    tables = [differences_table(differences)]
    return [*tables, differences_table(differences, others)] if others else tables


def _other_slices(differences: Mapping[str, Compared]) -> list[Column]:
    """AUC on the slices that :data:`DIFFERENCE_COLUMNS` lacks."""
    found = dict.fromkeys(rows for by_rows in differences.values() for rows in by_rows)
    return [
        Column(f"AUC, {rows.replace('_', ' ')}", rows, "auc")
        for rows in found
        if rows not in (ALL, *SLICES)
    ]


def bullets(notes: Iterable[str]) -> list[str]:
    """Notes as one list in Markdown; nothing where there are none."""
    text = "\n".join(f"- {note}" for note in notes)
    return [text] if text else []


def with_interval(
    value: float | None, low: float | None, high: float | None, *, signed: bool = False
) -> str:
    """``0.7753 [0.764, 0.786]``, signed ``+0.0048 [+0.0034, +0.0062]``; ``-`` without value."""
    if value is None:
        return "-"
    if signed:
        return f"{value:+.4f}" if low is None else f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"
    return f"{value:.4f}" if low is None else f"{value:.4f} [{low:.3f}, {high:.3f}]"


def _figure(values: Mapping[str, Any], figure: str) -> str:
    return with_interval(*(values.get(f"{figure}{end}") for end in ("", "_low", "_high")))


def _difference(values: Mapping[str, float | None]) -> str:
    return with_interval(*(values.get(key) for key in ("difference", "low", "high")), signed=True)
