"""Names for people: item ids, titles and behaviour texts, from the canonical tables."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from feature_repo.behavior import behavior_id
from feature_repo.errors import MissingStepError
from feature_repo.home import Home
from feature_repo.text_log import TextLog


@dataclass(frozen=True)
class Catalog:
    """Every item and every behaviour text of a data set.

    Args:
        item_ids: str objects [I], sorted; all items that ever had a version.
        title_ids: item id -> behaviour id of its latest title.
        text_by_id: behaviour id -> normalised text; :meth:`refresh` adds to it.
        log: Texts that live events bring meanwhile; None where there is no home.
    """

    item_ids: NDArray[np.object_]
    title_ids: dict[str, int]
    text_by_id: dict[int, str]
    log: TextLog | None = field(default=None, repr=False, compare=False)

    @classmethod
    def load(cls, home: Home) -> "Catalog":
        """Read the catalogue that the last ingest wrote.

        Raises:
            MissingStepError: If there is none.
        """
        if not home.items.exists():
            raise MissingStepError(f"{home.root} holds no items yet: run `longtrail ingest` first")
        items = pq.read_table(home.items, columns=["item_id", "event_timestamp", "text_id"])
        items = items.sort_by([("item_id", "ascending"), ("event_timestamp", "ascending")])
        # The last version of an item wins.
        titles = dict(zip(items["item_id"].to_pylist(), items["text_id"].to_pylist(), strict=True))
        behaviors = pq.read_table(home.behaviors, columns=["behavior_id", "text"])
        texts = dict(
            zip(behaviors["behavior_id"].to_pylist(), behaviors["text"].to_pylist(), strict=True)
        )
        catalog = cls(np.array(list(titles), dtype=object), titles, texts, TextLog(home.live_texts))
        catalog.refresh()
        return catalog

    def refresh(self) -> None:
        """Take in the texts of live events, of any process; a microsecond where none is new."""
        if self.log is not None:
            for text in self.log.news():
                self.text_by_id.setdefault(behavior_id(text), text)

    def texts(self, behavior_ids: NDArray[np.int64]) -> list[str]:
        """Text of every id; an empty one where it is unknown."""
        return [self.text_by_id.get(int(key), "") for key in behavior_ids]

    def title(self, item_id: str) -> str | None:
        """Latest title of an item; None for an unknown one."""
        key = self.title_ids.get(item_id)
        return None if key is None else self.text_by_id.get(key)
