"""What people search for to find an item: from the log of searches, or made from the title.

Where the data set has a scene of that name, a query belongs to the item of the user's next event
that names one, within half an hour. Where it has none, a query is made of the title's most telling
words: those in the fewest titles, but in at least two, in the order of the title.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from encoders.lm.records import plain
from encoders.query_engine import query_engine
from feature_repo.home import Home
from feature_repo.manifest import DataManifest

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
    SELECT user_id, event_timestamp, item_id FROM read_parquet($events)
    WHERE scene != $search AND item_id IS NOT NULL
),
pairs AS (
    SELECT found.item_id, searches.behavior_id
    FROM searches ASOF JOIN found
        ON found.user_id = searches.user_id AND found.event_timestamp > searches.event_timestamp
    WHERE found.event_timestamp <= searches.event_timestamp + INTERVAL ($minutes) MINUTE
)
SELECT item_id, text, count(*) AS num
FROM pairs JOIN read_parquet($behaviors) USING (behavior_id)
GROUP BY item_id, text ORDER BY item_id, num DESC, text
"""


@dataclass(frozen=True)
class Queries:
    """Queries that find an item.

    Args:
        logged: Item -> its queries, most frequent first; None where there is no log.
        num_titles: Word -> titles with it, where queries are made.
        num_words: Of a query that is made.
    """

    logged: Mapping[str, tuple[str, ...]] | None
    num_titles: Mapping[str, int]
    num_words: int

    @classmethod
    def read(
        cls, home: Home, manifest: DataManifest, titles: Iterable[str], num_words: int
    ) -> "Queries":
        """Read the log, or count the words.

        Args:
            home: The home folder; ingest has been run.
            manifest: Of its tables.
            titles: Those that may be learned from.
            num_words: Of a query that is made.
        """
        if SEARCH not in manifest.scenes:
            counted = Counter(word for title in titles for word in set(title.split()))
            return cls(None, counted, num_words)
        with query_engine() as connection:
            rows = connection.execute(
                _LOGGED,
                {
                    "events": str(home.events / "*.parquet"),
                    "behaviors": str(home.behaviors),
                    "search": SEARCH,
                    "minutes": WITHIN_MINUTES,
                },
            ).fetchall()
        logged: dict[str, tuple[str, ...]] = {}
        for item_id, text, _ in rows:
            logged[item_id] = (*logged.get(item_id, ()), plain(text))
        return cls(logged, {}, num_words)

    def of(self, item_id: str, title: str) -> tuple[str, ...]:
        """Queries for an item, the most frequent first; none where the title says too little."""
        if self.logged is not None:
            return self.logged.get(item_id, ())
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
