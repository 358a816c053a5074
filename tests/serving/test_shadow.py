import threading
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

from feature_repo.errors import LongtrailError
from serving.answers import RankedItem, Ranking
from serving.metrics import Metrics
from serving.question import Question
from serving.shadow import Shadow, compare
from tests.serving.conftest import World
from tests.serving.stand_in import StandIn

ANN = Question("ann")


def ranking(scores: dict[str, float]) -> Ranking:
    items = tuple(RankedItem(item_id, "", score, "") for item_id, score in scores.items())
    return replace(StandIn().rank("ann"), ranked=items)


def test_how_two_rankings_differ() -> None:
    ours = ranking({"a": 0.9, "b": 0.6, "c": 0.5, "d": 0.1})
    theirs = ranking({"b": 0.8, "a": 0.7, "c": 0.5, "e": 0.2})
    difference = compare(ours, theirs)
    assert difference.score == pytest.approx((0.2 + 0.2 + 0) / 3)
    assert difference.overlap == 0.75
    expected = spearmanr([0.9, 0.6, 0.5], [0.7, 0.8, 0.5]).statistic
    assert difference.correlation == pytest.approx(expected)


def test_the_same_ranking_does_not_differ() -> None:
    difference = compare(ranking({"a": 0.9, "b": 0.6}), ranking({"a": 0.9, "b": 0.6}))
    assert (difference.score, difference.overlap) == (0, 1)
    assert difference.correlation == pytest.approx(1)


@pytest.mark.parametrize(
    ("ours", "theirs", "overlap"),
    [({}, {}, 1), ({"a": 0.5}, {}, 0), ({"a": 0.5}, {"b": 0.5}, 0), ({}, {"a": 0.5}, 0)],
)
def test_rankings_that_share_nothing(
    ours: dict[str, float], theirs: dict[str, float], overlap: float
) -> None:
    difference = compare(ranking(ours), ranking(theirs))
    assert difference.score is difference.correlation is None
    assert difference.overlap == overlap


def test_all_scored_items_count_and_not_only_the_top(world: World) -> None:
    ours, theirs = (world.ranker().rank(user, top_k=1) for user in ("ann", "bob"))
    difference = compare(ours, theirs)
    everything = [world.ranker().rank(user, top_k=9).ranked for user in ("ann", "bob")]
    a, b = ({one.item_id: one.score for one in ranked} for ranked in everything)
    assert difference.score == pytest.approx(np.mean([abs(a[i] - b[i]) for i in a]), abs=1e-6)
    expected = spearmanr([a[i] for i in sorted(a)], [b[i] for i in sorted(a)]).statistic
    assert difference.correlation == pytest.approx(expected)
    assert difference.overlap == 0


def counts(metrics: Metrics) -> dict[str, float]:
    return {
        outcome: metrics.shadow.labels(outcome)._value.get()
        for outcome in ("compared", "dropped", "failed")
    }


def test_a_share_is_ranked_for_the_same_moment(caplog: pytest.LogCaptureFixture) -> None:
    metrics, ranker = Metrics(), StandIn("other-run")
    shadow = Shadow(ranker, share=0.25, metrics=metrics)
    answer = StandIn().rank("ann")
    with caplog.at_level("INFO"):
        for _ in range(40):
            shadow.offer(ANN, answer)
            shadow._thread.submit(lambda: None).result()  # no faster than it can rank
        shadow.close()
    assert counts(metrics) == {"compared": 10, "dropped": 0, "failed": 0}
    assert {asked["at"] for asked in ranker.asked} == {answer.at}
    assert metrics.shadow_overlap._sum.get() == 10
    assert metrics.shadow_difference._sum.get() == 0
    assert "run other-run in the shadow: overlap 1.00, score difference 0" in caplog.text


def test_what_it_cannot_keep_up_with_is_dropped_and_counted() -> None:
    metrics, go_on = Metrics(), threading.Event()

    def wait() -> None:
        assert go_on.wait(20)

    shadow = Shadow(StandIn(before=wait), share=1, metrics=metrics, max_queue=2)
    for _ in range(10):
        shadow.offer(ANN, StandIn().rank("ann"))
    assert counts(metrics)["dropped"] == 7  # one is being ranked, two wait
    go_on.set()
    shadow._thread.submit(lambda: None).result()
    assert counts(metrics)["compared"] == 3
    shadow.close()


def test_its_failures_are_its_own(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("no such vectors")

    metrics = Metrics()
    shadow = Shadow(StandIn("other-run", before=fail), share=1, metrics=metrics)
    shadow.offer(ANN, StandIn().rank("ann"))
    shadow._thread.submit(lambda: None).result()
    shadow.close()
    assert counts(metrics) == {"compared": 0, "dropped": 0, "failed": 1}
    assert "run other-run failed in the shadow: no such vectors" in caplog.text


@pytest.mark.parametrize("change", [{"share": 0}, {"share": 1.5}, {"max_queue": 0}])
def test_numbers_that_cannot_be(change: dict[str, float]) -> None:
    arguments = {"share": 0.5} | change
    with pytest.raises(LongtrailError, match="must be"):
        Shadow(StandIn(), metrics=Metrics(), **arguments)  # type: ignore[arg-type]
