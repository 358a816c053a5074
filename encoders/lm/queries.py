"""What people search for to find an item: from the log of searches, or made from the title.

Where the data set has a scene of that name, a query belongs to the item of the user's next event
that names one, within half an hour. Only searches that were answered before the validation period
are learned from; an answer that is measured may be one of any time. Where it has none, a query is
made of the title's most telling words: those in the fewest titles, but in at least two, in the
order of the title.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from encoders.lm.corpus import Split
from encoders.lm.examples import Clean
from feature_repo.home import Home
from feature_repo.manifest import DataManifest
from feature_repo.query_engine import query_engine

SEARCH = "search"
"""Name of the scene whose texts are queries."""
WITHIN_MINUTES = 30
"""Between a search and what it found: web analytics' usual end of a session."""
MIN_TITLES = 2
"""Titles that a word must be in: others are names, codes and misspellings that nobody types."""
MIN_LETTERS = 3

_LOGGED = """
WITH searches AS (
    SELECT user_id, event_timestamp, behavior_id FROM read_parquet($events)
    WHERE scene = $search
),
found AS (
    -- One item of a basket, always the same: a join by time takes any.
    SELECT user_id, event_timestamp, min(item_id) AS item_id FROM read_parquet($events)
    WHERE scene != $search AND item_id IS NOT NULL
    GROUP BY user_id, event_timestamp
),
pairs AS (
    SELECT found.item_id, searches.behavior_id, found.event_timestamp < $until AS is_learned
    FROM searches ASOF JOIN found
        ON found.user_id = searches.user_id AND found.event_timestamp > searches.event_timestamp
    WHERE found.event_timestamp <= searches.event_timestamp + INTERVAL ($minutes) MINUTE
),
counted AS (
    SELECT
        item_id, text, count(*) AS num, count(*) FILTER (WHERE is_learned) AS num_learned
    FROM pairs JOIN read_parquet($behaviors) USING (behavior_id)
    GROUP BY item_id, text
)
SELECT
    item_id,
    list(text ORDER BY num DESC, text),
    list(text ORDER BY num_learned DESC, text) FILTER (WHERE num_learned > 0)
FROM counted GROUP BY item_id ORDER BY item_id
"""


@dataclass(frozen=True)
class Queries:
    """Queries that find an item.

    Args:
        logged: Item -> its queries of all times, most frequent first; None where there is no log.
        learned: Item -> those before the validation period, most frequent first.
        num_titles: Word -> titles with it, where queries are made.
        num_words: Of a query that is made.
    """

    logged: Mapping[str, tuple[str, ...]] | None
    learned: Mapping[str, tuple[str, ...]]
    num_titles: Mapping[str, int]
    num_words: int

    @classmethod
    def read(
        cls,
        home: Home,
        manifest: DataManifest,
        titles: Iterable[str],
        num_words: int,
        clean: Clean,
    ) -> "Queries":
        """Read the log, or count the words.

        Args:
            home: The home folder; ingest has been run.
            manifest: Of its tables.
            titles: Those that may be learned from.
            num_words: Of a query that is made.
            clean: Of searches; titles are clean.
        """
        if SEARCH not in manifest.scenes:
            counted = Counter(word for title in titles for word in set(title.split()))
            return cls(None, {}, counted, num_words)
        with query_engine() as connection:
            rows = connection.execute(
                _LOGGED,
                {
                    "events": str(home.events / "*.parquet"),
                    "behaviors": str(home.behaviors),
                    "search": SEARCH,
                    "minutes": WITHIN_MINUTES,
                    "until": manifest.split.valid,
                },
            ).fetchall()
        logged = {item_id: tuple(map(clean, texts)) for item_id, texts, _ in rows}
        learned = {item_id: tuple(map(clean, texts)) for item_id, _, texts in rows if texts}
        return cls(logged, learned, {}, num_words)

    def of(self, item_id: str, title: str, split: Split) -> tuple[str, ...]:
        """Queries for an item of a split, the most frequent first.

        None where nobody searched for it, in the training split before the validation period, or
        where there is no log and the title says too little.
        """
        if self.logged is not None:
            return (self.learned if split == "train" else self.logged).get(item_id, ())
        words = _telling(title.split(), self.num_titles)[: self.num_words]
        if len(words) < self.num_words:
            return ()
        # In the order of the title, each where it stands first.
        return (" ".join(sorted(words, key=title.split().index)),)


def _telling(words: Sequence[str], num_titles: Mapping[str, int]) -> list[str]:
    """Distinct words, those in the fewest titles first; of equal ones the later in the title."""
    place = {word: number for number, word in enumerate(words)}
    usable = [
        word
        for word in place
        if sum(map(str.isalpha, word)) >= MIN_LETTERS and num_titles.get(word, 0) >= MIN_TITLES
    ]
    return sorted(usable, key=lambda word: (num_titles[word], -place[word]))
