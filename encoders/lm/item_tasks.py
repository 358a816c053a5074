"""Tasks on items: their title, their columns, and what one searches for to find them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from encoders.cooccurrence import SAME_BASKET, count_pairs
from encoders.lm.corpus import Split
from encoders.lm.examples import Clean, Example, TaskConfig
from encoders.lm.queries import Queries
from encoders.lm.records import (
    LISTING,
    ORDER,
    TITLE,
    field_token,
    format_number,
    plain,
    scene_token,
)
from feature_repo.errors import DataSetError
from feature_repo.home import Home
from feature_repo.manifest import DataManifest, ItemColumn
from feature_repo.query_engine import query_engine

BANDS = {
    2: ("low", "high"),
    3: ("low", "middle", "high"),
    4: ("lowest", "low", "high", "highest"),
    5: ("lowest", "low", "middle", "high", "highest"),
}
"""Names of so many bands of equal mass; fewer than five where values are equal."""
MAX_VALUES = 100
"""A categorical column with more values, or with less than two items to a value, is an identity and
no attribute."""
_MAX_PAIRS = 10_000_000
"""Pairs counted for the neighbours: a share of the users stands for all, in seconds."""

_ITEMS = """
WITH versions AS (
    SELECT item_id, event_timestamp, text_id, {columns}
        min(event_timestamp) OVER (PARTITION BY item_id) >= $until AS is_new,
        row_number() OVER (
            PARTITION BY item_id
            ORDER BY
                event_timestamp < $until DESC,
                abs(epoch_us(event_timestamp) - epoch_us($until::TIMESTAMPTZ))
        ) AS place
    FROM read_parquet($items)
)
SELECT item_id, text, {columns} is_new
FROM versions JOIN read_parquet($behaviors) ON behavior_id = text_id
WHERE place = 1 ORDER BY item_id
"""


@dataclass(frozen=True)
class Item:
    """An item as it was last known before the validation period; as it began, if it is new."""

    item_id: str
    title: str
    fields: Mapping[str, float | str | None]
    """Own column -> value."""
    is_new: bool
    """First seen in the validation period or later."""
    split: Split


def read_items(home: Home, manifest: DataManifest, config: TaskConfig, clean: Clean) -> list[Item]:
    """All items with a title, by id.

    Args:
        home: The home folder; ingest has been run.
        manifest: Of its tables.
        config: Which are held out.
        clean: Of titles and categorical columns.
    """
    names = [column.name for column in manifest.item_columns]
    quoted = "".join('"' + name.replace('"', '""') + '", ' for name in names)
    with query_engine() as connection:
        rows = connection.execute(
            _ITEMS.format(columns=quoted),
            {
                "items": str(home.items),
                "behaviors": str(home.behaviors),
                "until": manifest.split.valid,
            },
        ).fetchall()
    items = []
    for item_id, text, *values, is_new in rows:
        title = clean(text)
        known = (_known(value, clean) for value in values)
        split: Split = "test" if is_new else config.split_of(title)
        items.append(Item(item_id, title, dict(zip(names, known, strict=True)), is_new, split))
    return items


def title_examples(
    home: Home,
    manifest: DataManifest,
    items: Sequence[Item],
    scene: str,
    config: TaskConfig,
    clean: Clean,
) -> list[Example]:
    """The title from the item's columns and the texts most often bought with it.

    Counted before the validation period, a text's weight being ``count / sqrt(its frequency)``. The
    rule answers the first of them. An item of which nothing is known has no example.
    """
    neighbors = _neighbors(home, manifest, config.num_neighbors, clean)
    examples = []
    for item in items:
        texts = neighbors.get(item.title, [])
        fields = "".join(
            field_token(name) + _written(value)
            for name, value in item.fields.items()
            if value is not None
        )
        if not (texts or fields):
            continue
        lines = "".join(scene_token(scene) + text for text in texts)
        record = LISTING + fields + (ORDER + lines if lines else "")
        rule = {"first_neighbor": texts[0] if texts else ""}
        examples.append(_example("title", item, "title", record, (item.title,), rule))
    return examples


def attribute_examples(column: ItemColumn, items: Sequence[Item]) -> list[Example]:
    """A column's value from the title; the rule answers the most frequent one.

    The bands of a numeric column are the fifths of the items that are learned from. None where
    the column has one value only, or is an identity (:data:`MAX_VALUES`).
    """
    known = [item for item in items if item.fields[column.name] is not None]
    values = [item.fields[column.name] for item in known]
    is_learned = np.array([item.split == "train" for item in known], dtype=bool)
    if not is_learned.any():
        return []
    if column.kind == "numeric":
        numbers = np.array(values, dtype=np.float64)
        learned = numbers[is_learned]
        edges = np.unique(np.quantile(learned, [0.2, 0.4, 0.6, 0.8]))
        edges = edges[edges > learned.min()]
        if not len(edges):
            return []
        names = BANDS[len(edges) + 1]
        instruction = f"{column.name} band"
        answers = [names[band] for band in np.searchsorted(edges, numbers, side="right")]
    else:
        answers = [str(value) for value in values]
        num_values = len(set(np.array(answers)[is_learned]))
        if not 1 < num_values <= min(MAX_VALUES, is_learned.sum() // 2):
            return []
        instruction = column.name
    counted = Counter(np.array(answers)[is_learned].tolist())
    rule = {"most_frequent": _most(counted)}
    return [
        _example(
            f"attribute:{column.name}",
            item,
            plain(instruction),
            LISTING + TITLE + item.title,
            (answer,),
            rule,
        )
        for item, answer in zip(known, answers, strict=True)
    ]


def query_examples(items: Sequence[Item], queries: Queries) -> list[Example]:
    """What one searches for to find the item, from its title; the rule answers its first words."""
    lengths = [
        len(text.split())
        for item in items
        if item.split == "train"
        for text in queries.of(item.item_id, item.title, "train")[:1]
    ]
    if not lengths:
        return []
    num_words = int(np.median(lengths))
    examples = []
    for item in items:
        answers = queries.of(item.item_id, item.title, item.split)
        if answers:
            record = LISTING + TITLE + item.title
            rule = {"first_words": " ".join(item.title.split()[:num_words])}
            examples.append(_example("query", item, "search query", record, answers, rule))
    return examples


def _example(
    task: str,
    item: Item,
    instruction: str,
    record: str,
    answers: tuple[str, ...],
    rules: dict[str, str],
) -> Example:
    return Example(task, item.split, item.item_id, instruction, record, answers, rules, item.is_new)


def _neighbors(home: Home, manifest: DataManifest, num: int, clean: Clean) -> dict[str, list[str]]:
    """Text -> the texts most often bought with it, the strongest first."""
    if not num:
        return {}
    try:
        counted = count_pairs(
            home,
            start=manifest.first_event,
            stop=manifest.split.valid,
            gaps=(SAME_BASKET,),
            max_pairs=_MAX_PAIRS,
        )
    except DataSetError:  # nobody ever bought two things together
        return {}
    texts = [clean(text) for text in counted.texts]
    found = {}
    for place, text in enumerate(texts):
        pairs = slice(counted.starts[place], counted.starts[place + 1])
        partners = counted.partners[pairs]
        weights = counted.counts[pairs] / np.sqrt(counted.num_baskets[partners])
        found[text] = [texts[partners[n]] for n in np.argsort(-weights, kind="stable")[:num]]
    return found


def _known(value: Any, clean: Clean) -> float | str | None:
    """A value, None where it is missing or no number."""
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return None
    return clean(value) if isinstance(value, str) else float(value)


def _written(value: float | str) -> str:
    return value if isinstance(value, str) else format_number(value)


def _most(counted: Counter[str]) -> str:
    """The most frequent; of equal ones the first in the alphabet."""
    return min(counted, key=lambda text: (-counted[text], text)) if counted else ""
