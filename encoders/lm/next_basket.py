"""The task on users: one text of the next basket, from the baskets before it."""

from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import groupby
from operator import itemgetter

from encoders.lm.corpus import Split
from encoders.lm.examples import Clean, Example, TaskConfig
from encoders.lm.records import Order, history_text, order_text, plain
from feature_repo.home import Home
from feature_repo.manifest import DataManifest
from feature_repo.query_engine import query_engine

PURCHASE = "purchase"
"""Scene that is foretold where the data set has it; else the one with most events to learn from."""
_POPULAR_DAYS = 30
"""Before the validation period: whose most frequent text a rule answers."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_SCENE = """
SELECT scene FROM read_parquet($events) GROUP BY scene
ORDER BY
    scene = $purchase DESC, count(*) FILTER (WHERE event_timestamp < $valid) DESC, scene
LIMIT 1
"""
_POPULAR = """
SELECT text FROM read_parquet($events) JOIN read_parquet($behaviors) USING (behavior_id)
WHERE scene = $scene AND event_timestamp < $valid
    AND event_timestamp >= $valid - INTERVAL ($days) DAY
GROUP BY text ORDER BY count(*) DESC, text LIMIT 1
"""
_BASKETS = """
WITH begun AS (
    SELECT user_id, min(event_timestamp) AS first FROM read_parquet($events) GROUP BY user_id
),
baskets AS (
    SELECT
        user_id, event_timestamp AS moment, list(DISTINCT behavior_id) AS answers,
        CASE
            WHEN event_timestamp < $valid THEN 'train'
            WHEN event_timestamp < $test THEN 'valid'
            ELSE 'test'
        END AS split,
        md5(concat_ws(':', $seed, user_id, epoch_us(event_timestamp))) AS lot
    FROM read_parquet($events) JOIN begun USING (user_id)
    WHERE scene = $scene AND event_timestamp > first
    GROUP BY user_id, event_timestamp
    QUALIFY row_number() OVER (PARTITION BY user_id, split ORDER BY lot) <= $user_baskets
),
drawn AS (
    SELECT * FROM baskets
    QUALIFY row_number() OVER (PARTITION BY split ORDER BY lot)
        <= CASE split WHEN 'train' THEN $max_train WHEN 'valid' THEN $max_valid ELSE $max_test END
),
lines AS (
    SELECT drawn.user_id, moment, event_timestamp, scene, behavior_id
    FROM drawn JOIN read_parquet($events) events
        ON events.user_id = drawn.user_id AND events.event_timestamp < moment
    QUALIFY row_number() OVER (
        PARTITION BY drawn.user_id, moment
        ORDER BY event_timestamp DESC, md5(concat_ws(':', $seed, behavior_id)), scene
    ) <= $history_lines
),
histories AS (
    SELECT
        user_id, moment,
        list(epoch_us(event_timestamp) ORDER BY event_timestamp, scene, text) AS times,
        list(scene ORDER BY event_timestamp, scene, text) AS scenes,
        list(text ORDER BY event_timestamp, scene, text) AS texts
    FROM lines JOIN read_parquet($behaviors) USING (behavior_id) GROUP BY user_id, moment
)
SELECT
    split, user_id, epoch_us(moment), any_value(times), any_value(scenes), any_value(texts),
    list(text ORDER BY md5(lot || text), text)
FROM drawn JOIN histories USING (user_id, moment), unnest(answers) AS told(behavior_id)
JOIN read_parquet($behaviors) USING (behavior_id)
GROUP BY split, user_id, moment ORDER BY split, user_id, moment
"""


def foretold_scene(home: Home, manifest: DataManifest) -> str | None:
    """The scene whose next basket is foretold; None where there are no events."""
    with query_engine() as connection:
        found = connection.execute(
            _SCENE,
            {
                "events": str(home.events / "*.parquet"),
                "purchase": PURCHASE,
                "valid": manifest.split.valid,
            },
        ).fetchone()
    return None if found is None else str(found[0])


def next_basket_examples(
    home: Home, manifest: DataManifest, scene: str, config: TaskConfig, clean: Clean
) -> list[Example]:
    """One text of a user's next basket in a scene, from the newest lines of all scenes before.

    Every text of that basket is right, one drawn by hash is learned. The rules answer the most
    frequent text of the last month before the validation period, and the most frequent of the
    lines that are shown.

    Args:
        home: The home folder; ingest has been run.
        manifest: Of its tables; its split decides over the splits here.
        scene: What is foretold.
        config: How many.
        clean: Of the texts.
    """
    files = {"events": str(home.events / "*.parquet"), "behaviors": str(home.behaviors)}
    split = {"valid": manifest.split.valid, "test": manifest.split.test}
    with query_engine() as connection:
        popular = connection.execute(
            _POPULAR,
            {**files, "scene": scene, "valid": split["valid"], "days": _POPULAR_DAYS},
        ).fetchone()
        rows = connection.execute(
            _BASKETS,
            {
                **files,
                **split,
                "scene": scene,
                "seed": str(config.seed),
                "user_baskets": config.user_baskets,
                "max_train": config.max_train_baskets,
                "max_valid": config.max_valid,
                "max_test": config.max_test,
                "history_lines": config.history_lines,
            },
        ).fetchall()
    popular_text = clean(popular[0]) if popular else ""
    return [_example(scene, popular_text, clean, *row) for row in rows]


def _example(
    scene: str,
    popular: str,
    clean: Clean,
    split: Split,
    user_id: str,
    moment_us: int,
    times_us: list[int],
    scenes: list[str],
    texts: list[str],
    answers: list[str],
) -> Example:
    """An example from a row of the query; the lines come oldest first."""
    texts = [clean(text) for text in texts]
    lines = zip(times_us, scenes, texts, strict=True)
    orders = [
        Order(_time(time_us), [(of_scene, text) for _, of_scene, text in together])
        for time_us, together in groupby(lines, key=itemgetter(0))
    ]
    counted = Counter(texts)
    newest = {text: place for place, text in enumerate(texts)}  # of equally frequent ones
    usual = max(counted, key=lambda text: (counted[text], newest[text]))
    return Example(
        task=f"next_{scene}",
        split=split,
        key=user_id,
        instruction=f"next {plain(scene)}",
        record=history_text(orders) + order_text(Order(_time(moment_us), []), before=orders[-1]),
        answers=tuple(map(clean, answers)),
        rules={"popular": popular, "users_usual": usual},
    )


def _time(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=microseconds)
