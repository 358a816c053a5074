"""Plots as SVG that stands in a page: its text and lines take the page's colour."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#010203"
"""Stands for the page's text colour until the SVG is written."""
COLORS = ("#2a78c2", "#d1701c", "#3f9e63", "#a34fb0", "#c23b4e", "#7a7f87")
"""Legible on white and on near-black."""
_STYLE: Any = {  # matplotlib types its keys one by one
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
WIDTH, BROAD, _HEIGHT = 4.6, 9.2, 3.4
"""Inches: of a plot beside others, of one as wide as the page, of both."""


def svg(
    name: str,
    draw: Callable[[Sequence[Axes]], None],
    *,
    panels: int = 1,
    width: float = WIDTH,
) -> str:
    """Draw on ``panels`` axes beside each other.

    Args:
        name: Unique in the page: keeps the ids inside the SVG apart.
        draw: Given the axes.
        panels: Number of axes.
        width: Of all together, inches of 72 units.
    """
    with mpl.rc_context(_STYLE), mpl.rc_context({"svg.hashsalt": name}):
        figure = Figure(figsize=(width, _HEIGHT), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        draw(list(axes))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Ids of groups are counted, so two plots would share them; nothing refers to them.
    text = re.sub(r'<g id="[^"]*_\d+">', "<g>", text)
    text = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1 aria-hidden='true'>", text, count=1
    )
    text = text.replace("xlink:href", "href")
    return text.replace(INK, "currentColor")
