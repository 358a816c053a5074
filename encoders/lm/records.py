"""Structured records as text: listings, orders and histories in templates of special tokens.

A record is a kind token, then fields; a field is its token, then its value, up to the next token::

    <|listing|><|title|>white hanging heart<|field:price|>2.55<|field:uk_share|>0.857
    <|order|><|month|>12<|scene:purchase|>white hanging heart<|scene:purchase|>lunch bag
    <|history|><|order|><|month|>3<|scene:purchase|>...<|order|><|month|>4<|days|>14<|scene:...

Item columns and scenes are the data set's own: their tokens are made of their names. Every document
ends with :data:`END`, which is not part of its text: whoever tokenises adds it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from feature_repo.manifest import DataManifest

END = "<|end|>"
"""End of every document: the tokenizer's eos."""
PAD = "<|pad|>"
INSTRUCTION = "<|instruction|>"
"""Begins a task, for instruction tuning."""
ANSWER = "<|answer|>"
"""Begins the answer to it."""
LISTING = "<|listing|>"
ORDER = "<|order|>"
HISTORY = "<|history|>"
TITLE = "<|title|>"
MONTH = "<|month|>"
"""Of an order, 1 to 12, UTC: what is bought changes with the season. The year is left out, for no
model learns anything about a year that it has not seen."""
DAYS = "<|days|>"
"""Whole days since the order before, in a history."""
SPECIAL_TOKENS = (END, PAD, INSTRUCTION, ANSWER, LISTING, ORDER, HISTORY, TITLE, MONTH, DAYS)
"""Of every tokenizer; :func:`special_tokens` adds the data set's own."""

_TOKEN = re.compile(r"<\|[^|<>]+\|>")
_NO_NAME = re.compile(r"[^\w.-]")


def field_token(column: str) -> str:
    """Token before the values of an item column: ``<|field:price|>``."""
    return f"<|field:{_NO_NAME.sub('_', column)}|>"


def scene_token(scene: str) -> str:
    """Token before what was done in a scene: ``<|scene:purchase|>``."""
    return f"<|scene:{_NO_NAME.sub('_', scene)}|>"


def special_tokens(manifest: DataManifest) -> tuple[str, ...]:
    """All tokens of a data set's records: :data:`SPECIAL_TOKENS`, its columns, its scenes."""
    columns = (field_token(column.name) for column in manifest.item_columns)
    scenes = (scene_token(scene) for scene in manifest.scenes)
    return tuple(dict.fromkeys([*SPECIAL_TOKENS, *columns, *scenes]))


def plain(text: str) -> str:
    """Text from outside: ``<|`` becomes ``< |``, so that only templates write special tokens."""
    return text.replace("<|", "< |")


def field_texts(document: str) -> list[str]:
    """What stands between a document's special tokens, without what is empty."""
    return [text for text in _TOKEN.split(document) if text]


def format_number(value: float) -> str:
    """A number as people write it: two decimals, or three significant digits if these are more."""
    if not math.isfinite(value) or value == 0:
        return "0" if value == 0 else str(value)
    decimals = max(2, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}".rstrip("0").rstrip(".")


@dataclass(frozen=True)
class Order:
    """What one user did at one moment.

    Args:
        time: When, with a zone; UTC.
        lines: (scene, text), at least one.
    """

    time: datetime
    lines: Sequence[tuple[str, str]]


def listing_text(title: str, fields: Mapping[str, float | str | None]) -> str:
    """An item's version as text.

    Args:
        title: The item's text.
        fields: Column -> value, in the data set's order; missing values are left out.
    """
    parts = [LISTING, TITLE, plain(title)]
    for column, value in fields.items():
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        text = plain(value) if isinstance(value, str) else format_number(value)
        parts += [field_token(column), text]
    return "".join(parts)


def order_text(order: Order, *, before: Order | None = None) -> str:
    """An order as text; ``before`` is the user's last one, where the time between shall stand."""
    parts = [ORDER, MONTH, str(order.time.month)]
    if before is not None:
        parts += [DAYS, str((order.time - before.time).days)]
    for scene, text in order.lines:
        parts += [scene_token(scene), plain(text)]
    return "".join(parts)


def history_text(orders: Sequence[Order]) -> str:
    """A user's orders of a period as text, oldest first."""
    before = [None, *orders[:-1]]
    return HISTORY + "".join(
        order_text(order, before=last) for order, last in zip(orders, before, strict=True)
    )
