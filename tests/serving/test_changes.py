"""Histories that might have been."""

import numpy as np
import pytest

from feature_repo.behavior import behavior_id, item_key
from feature_repo.errors import LongtrailError
from serving.answers import AddedBehavior, HistoryChanges
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
    ("changes", "message"),
    [
        (HistoryChanges(removed=(3,)), "remove behaviour 3, but the history has 3"),
        (HistoryChanges(removed=(-1,)), "remove behaviour -1"),
        (
            HistoryChanges(added=(AddedBehavior("return", "x"),)),
            "scene 'return'; there are purchase",
        ),
        (HistoryChanges(added=(AddedBehavior("search"),)), "without a text"),
        (HistoryChanges(added=(AddedBehavior("search", text=" "),)), "without a text"),
        (HistoryChanges(added=(AddedBehavior("search", item_id="zzz"),)), "without a text"),
    ],
)
def test_changes_that_cannot_be(world: World, changes: HistoryChanges, message: str) -> None:
    with pytest.raises(LongtrailError, match=message):
        world.ranker().rank("ann", changes=changes)
