"""Histories that might have been."""

import numpy as np
import pytest

from feature_repo.behavior import behavior_id, item_key
from serving.answers import AddedBehavior, HistoryChanges, UnusableChangeError
from serving.changes import change_history
from tests.serving.conftest import KEPT, NOW, World


def texts(ranking) -> list[tuple[str, str]]:
    return [(behavior.scene, behavior.text) for behavior in ranking.history]


def test_leaving_a_behaviour_out_changes_history_and_scores(world: World) -> None:
    ranker = world.ranker()
    whole = ranker.rank("ann")
    assert texts(whole) == [
        ("purchase", "red lamp"),
        ("search", "looking for a lamp"),
        ("purchase", "red lamp"),
    ]
    found = ranker.rank("ann", changes=HistoryChanges(removed=(0, 2)))
    assert texts(found) == [("search", "looking for a lamp")]
    assert "L1" in {item.item_id for item in found.ranked}
    score = {item.item_id: item.score for item in found.ranked}
    assert score["L1"] < {item.item_id: item.score for item in whole.ranked}["L1"]
    assert ranker.rank("ann") == whole  # nothing was kept


def test_an_added_behaviour_is_the_newest(world: World) -> None:
    ranker = world.ranker()
    changes = HistoryChanges(
        added=(
            AddedBehavior("search", text="  Sail   BOAT "),
            AddedBehavior("purchase", item_id="B2"),
        )
    )
    found = ranker.rank("ann", changes=changes)
    assert texts(found)[:2] == [("purchase", "row boat"), ("search", "sail boat")]
    assert found.history[0].item_id == "B2"
    assert found.history[0].time == NOW
    assert found.ranked[0].item_id in {"B1", "B2"}
    assert {item.item_id: item.reason for item in found.ranked}["B2"].startswith("purchase before")


def test_nobody_gets_a_history(world: World) -> None:
    changes = HistoryChanges(added=(AddedBehavior("purchase", item_id="B1"),))
    found = world.ranker().rank("nobody", changes=changes)
    assert texts(found) == [("purchase", "sail boat")]
    assert not found.known


def test_the_oldest_gives_way_and_totals_count_all(world: World) -> None:
    users = world.reader.online_users(np.array(["ann"], dtype=object), at=NOW)
    changes = HistoryChanges(added=(AddedBehavior("purchase", item_id="B1"),) * (KEPT + 1))
    found = change_history(
        users, changes, title=lambda _: "sail boat", normalize=lambda text: text
    ).sequences["purchase"]
    assert found.behavior_ids[0].tolist() == [behavior_id("sail boat")] * KEPT
    assert found.item_keys[0].tolist() == [item_key("B1")] * KEPT
    assert found.total.tolist() == [2 + KEPT + 1]


@pytest.mark.parametrize(
    ("changes", "place", "sentence"),
    [
        (
            HistoryChanges(removed=(0, 3)),
            ("removed", 1),
            "changes.removed[1]: the history has 3 behaviours, counted from 0",
        ),
        (
            HistoryChanges(removed=(-1,)),
            ("removed", 0),
            "changes.removed[0]: the history has 3 behaviours, counted from 0",
        ),
        (
            HistoryChanges(added=(AddedBehavior("return", "x"),)),
            ("added", 0, "scene"),
            "changes.added[0].scene: there is no such scene; there are purchase, search",
        ),
        (
            HistoryChanges(added=(AddedBehavior("search"),)),
            ("added", 0),
            "changes.added[0]: text or item_id is needed",
        ),
        (
            HistoryChanges(added=(AddedBehavior("search", "x"), AddedBehavior("search", " "))),
            ("added", 1, "text"),
            "changes.added[1].text: the text is blank",
        ),
        (
            HistoryChanges(added=(AddedBehavior("search", item_id="zzz"),)),
            ("added", 0, "item_id"),
            "changes.added[0].item_id: the item has no title that could be the text: give text",
        ),
    ],
)
def test_changes_that_cannot_be(
    world: World, changes: HistoryChanges, place: tuple[str | int, ...], sentence: str
) -> None:
    with pytest.raises(UnusableChangeError) as caught:
        world.ranker().rank("ann", changes=changes)
    assert caught.value.place == place
    assert str(caught.value) == sentence


def test_one_behaviour_is_one(world: World) -> None:
    with pytest.raises(UnusableChangeError, match="the history has 1 behaviour, counted"):
        world.ranker().rank("bob", changes=HistoryChanges(removed=(1,)))
