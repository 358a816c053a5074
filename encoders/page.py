"""A page of HTML from tables, plots and facts; ``page.html`` is its template.

The file needs nothing else: no script, style, font or picture from outside.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from feature_repo.home import complete_file


@dataclass(frozen=True)
class Table:
    """A table of ready texts."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The first cell names the row."""


@dataclass(frozen=True)
class Plot:
    """An SVG with what it says in words."""

    svg: str
    caption: str
    alt: str
    broad: bool = False
    """As wide as the page."""


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    facts: Sequence[tuple[str, str]] = ()


def write_page(
    path: Path, *, title: str, subtitle: str, notes: Sequence[str], sections: Sequence[Section]
) -> None:
    """Write the page; all texts are escaped, the plots are taken as they are."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(Path(__file__).with_name("page.html").read_text("utf-8"))
    page = template.render(title=title, subtitle=subtitle, notes=notes, sections=sections)
    with complete_file(path) as part:
        part.write_text(page, encoding="utf-8")
