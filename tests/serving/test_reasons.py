import numpy as np
import pytest

from feature_repo.behavior import item_key
from serving.history import History
from serving.reasons import ago, reasons

NOW = 1_700_000_000
DAY = 86_400


def history(*events: tuple[str, str | None, int]) -> History:
    """Events are (scene, item id, seconds ago), newest first."""
    return History(
        scenes=np.array([scene for scene, _, _ in events], dtype=object),
        behavior_ids=np.arange(1, len(events) + 1),
        item_keys=np.array([item_key(item_id) for _, item_id, _ in events], dtype=np.int64),
        timestamps=np.array([NOW - age for _, _, age in events], dtype=np.int64),
        positions=np.arange(len(events)),
        now=NOW,
    )


def reason_of(
    past: History,
    texts: list[str],
    *,
    item: str = "X",
    item_vector: tuple[float, float] = (1.0, 0.0),
    vectors: list[tuple[float, float]] | None = None,
    popular: bool = False,
) -> str:
    (reason,) = reasons(
        past,
        texts,
        item_keys=np.array([item_key(item)]),
        item_vectors=np.array([item_vector], dtype=np.float32),
        history_vectors=np.array(vectors or [(0.0, 1.0)] * len(past), dtype=np.float32).reshape(
            -1, 2
        ),
        popular=np.array([popular]),
        min_similarity=0.7,
    )
    return reason


def test_exact_evidence_counts_and_dates() -> None:
    past = history(
        ("purchase", "X", 12 * DAY), ("purchase", "X", 30 * DAY), ("purchase", "X", 31 * DAY)
    )
    assert reason_of(past, ["x"] * 3) == "purchase before: 3 times, last 12 days ago"


def test_exact_evidence_of_several_scenes_newest_first() -> None:
    past = history(
        ("purchase", "Y", 60),
        ("cancellation", "X", DAY),
        ("purchase", "X", 2 * DAY),
        ("purchase", "X", 3 * DAY),
    )
    assert reason_of(past, list("abcd")) == (
        "cancellation before: once, 1 day ago; purchase before: 2 times, last 2 days ago"
    )


def test_events_without_an_item_are_no_exact_evidence() -> None:
    assert reason_of(history(("search", None, 5)), ["x"]) == "nothing alike in the history"


def test_most_similar_behaviour_newest_of_equals() -> None:
    past = history(("search", None, 1), ("search", None, 2), ("search", None, 3))
    vectors = [(0.6, 0.8), (0.8, 0.6), (0.8, 0.6)]
    assert reason_of(past, ["far", "near", "near too"], vectors=vectors) == "like 'near'"


def test_below_the_bar_nothing_is_alike() -> None:
    past = history(("search", None, 1))
    assert reason_of(past, ["far"], vectors=[(0.6, 0.8)]) == "nothing alike in the history"
    assert reason_of(past, ["far"], vectors=[(0.6, 0.8)], popular=True) == "popular now"


def test_item_without_a_text_is_like_nothing() -> None:
    past = history(("search", None, 1))
    assert reason_of(past, ["x"], item_vector=(0.0, 0.0)) == "nothing alike in the history"


def test_no_history() -> None:
    assert reason_of(history(), []) == "new user"
    assert reason_of(history(), [], popular=True) == "popular now"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-5, "less than a minute ago"),
        (59, "less than a minute ago"),
        (60, "1 minute ago"),
        (7_199, "1 hour ago"),
        (7_200, "2 hours ago"),
        (DAY, "1 day ago"),
        (800 * DAY, "800 days ago"),
    ],
)
def test_ages(seconds: int, words: str) -> None:
    assert ago(seconds) == words
