import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from encoders.evidence import evidence_names
from encoders.loaded_artifact import Artifact
from encoders.table import EmbeddingTable
from feature_repo.behavior import behavior_id
from feature_repo.errors import ArtifactError, LongtrailError, MissingStepError, StoreError
from feature_repo.features import ItemFeatures
from serving.history import History
from serving.preparation import RankerConfig
from serving.ranker import Ranker
from tests import waiting
from tests.serving.conftest import (
    FINGERPRINT,
    ITEMS,
    KEPT,
    NOW,
    RUN,
    USERS,
    VECTORS,
    ToyItem,
    ToyReader,
    ToyUser,
    World,
    expected_logit,
    toy_catalog,
    toy_manifest,
)

wait_until = partial(waiting.wait_until, most_s=10, poll_s=0.001)


def sigmoid(logit: float) -> float:
    return float(1 / (1 + np.exp(-logit)))


def expected_scores(
    user: ToyUser, items: dict[str, ToyItem] = ITEMS, slot: float = 0.0
) -> list[tuple[str, float]]:
    scores = {
        item_id: sigmoid(expected_logit(user, item_id, item, slot))
        for item_id, item in items.items()
    }
    return sorted(scores.items(), key=lambda pair: (-round(pair[1], 6), pair[0]))


@pytest.mark.parametrize("user_id", ["ann", "bob", "idle"])
def test_order_scores_and_ties(world: World, user_id: str) -> None:
    ranking = world.ranker().rank(user_id)
    expected = expected_scores(USERS[user_id])
    assert [item.item_id for item in ranking.ranked] == [item_id for item_id, _ in expected]
    scores = [item.score for item in ranking.ranked]
    np.testing.assert_allclose(scores, [score for _, score in expected], atol=1e-6)
    assert (ranking.user_id, ranking.known, ranking.model) == (user_id, True, RUN)
    assert (ranking.at, ranking.num_scored, ranking.unknown_items) == (NOW, 6, ())


def test_equal_scores_are_ordered_by_item_id(world: World) -> None:
    ranked = world.ranker().rank("bob", candidates=["A2", "L1", "A1"]).ranked
    assert [item.item_id for item in ranked] == ["A1", "A2", "L1"]
    assert ranked[0].score == ranked[1].score


def test_texts_and_reasons(world: World) -> None:
    ranking = world.ranker().rank("ann")
    assert [(item.item_id, item.text, item.reason) for item in ranking.ranked[:3]] == [
        ("L1", "red lamp", "purchase before: 2 times, last 12 days ago"),
        ("L2", "green lamp", "like 'red lamp'"),
        ("B1", "sail boat", "nothing alike in the history"),
    ]
    lamp = world.ranker().rank("bob", candidates=["L1"]).ranked[0]
    assert lamp.reason == "popular now"


def test_history_is_newest_first_across_scenes(world: World) -> None:
    history = world.ranker().rank("ann", top_k=1).history
    assert [(entry.text, entry.scene, (NOW - entry.time).days) for entry in history] == [
        ("red lamp", "purchase", 12),
        ("looking for a lamp", "search", 20),
        ("red lamp", "purchase", 40),
    ]


def test_history_of_one_moment_has_later_entries_first() -> None:
    events = tuple(("purchase", text, None, 1.0) for text in ("red lamp", "anvil", "row boat"))
    world_reader = ToyReader({"u": ToyUser((*events, ("search", "anvil", None, 1.0)))}, {})
    history = History.of(world_reader.online_users(np.array(["u"], dtype=object)))
    texts = toy_catalog({}).texts(history.behavior_ids)
    assert texts == ["row boat", "anvil", "red lamp", "anvil"]
    assert history.scenes.tolist() == ["purchase"] * 3 + ["search"]


def test_the_model_reads_the_newest_behaviours_only(world: World) -> None:
    long = ToyUser(
        (*(("purchase", "red lamp", "L1", 50.0 - day) for day in range(30)),), activity=0.125
    )
    world.reader.users["long"] = long
    ranking = world.ranker().rank("long", candidates=["L1"])
    assert ranking.ranked[0].score == pytest.approx(
        sigmoid(expected_logit(long, "L1", ITEMS["L1"])), abs=1e-6
    )
    assert len(ranking.history) == KEPT
    view = world.ranker().user("long")
    assert view.totals == {"purchase": 30, "search": 0}


def test_unknown_user_is_ranked_with_an_empty_history(world: World) -> None:
    ranking = world.ranker().rank("nobody")
    assert not ranking.known
    assert ranking.history == ()
    assert ranking.notes == ("unknown user: ranked by the model with an empty history",)
    assert [item.item_id for item in ranking.ranked] == [
        item_id for item_id, _ in expected_scores(ToyUser())
    ]
    reasons = {item.item_id: item.reason for item in ranking.ranked}
    assert reasons.pop("L1") == "popular now"
    assert set(reasons.values()) == {"new user"}


def test_known_user_without_behaviours(world: World) -> None:
    ranking = world.ranker().rank("idle", top_k=1)
    assert ranking.known
    assert ranking.notes == ("no behaviours are kept: ranked by the model with an empty history",)


def test_unknown_items_are_named_and_not_ranked(world: World) -> None:
    ranking = world.ranker().rank("ann", candidates=["zzz", "L2", "GONE", "L2"])
    assert [item.item_id for item in ranking.ranked] == ["L2"]
    assert ranking.unknown_items == ("zzz", "GONE")
    assert ranking.num_scored == 1
    assert ranking.notes == (
        "candidates named more than once were ranked once",
        "2 unknown items left out",
    )


def test_all_candidates_unknown(world: World) -> None:
    ranking = world.ranker().rank("ann", candidates=["zzz"])
    assert (ranking.ranked, ranking.unknown_items, ranking.num_scored) == ((), ("zzz",), 0)
    assert "nothing to rank: the feature store knows none of the items" in ranking.notes


def test_item_that_came_after_the_catalogue_was_read(world: World) -> None:
    ranker = world.ranker()
    ranker.refresh_items()
    world.reader.items["NEW"] = ToyItem("row boat", price=4.0, kind="boat", recent=50)
    ranking = ranker.rank("bob", candidates=["L1", "NEW", "B1"], top_k=2)
    assert ranking.unknown_items == ()
    assert ranking.num_scored == 3
    assert [item.item_id for item in ranking.ranked] == ["B1", "NEW"]
    assert ranking.ranked[1].score == pytest.approx(
        sigmoid(expected_logit(USERS["bob"], "NEW", world.reader.items["NEW"])), abs=1e-6
    )


def test_top_k_cuts_the_same_order(world: World) -> None:
    whole = world.ranker().rank("ann").ranked
    assert world.ranker().rank("ann", top_k=2).ranked == whole[:2]


def test_context_is_the_same_for_every_candidate(world: World) -> None:
    ranking = world.ranker().rank("ann", context={"slot": 0.5})
    expected = dict(expected_scores(USERS["ann"], slot=0.5))
    for item in ranking.ranked:
        assert item.score == pytest.approx(expected[item.item_id], abs=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 4, 30])
def test_chunks_equal_one_pass(world: World, chunk_size: int) -> None:
    kinds = ("lamp", "boat", None)
    texts = [item.text for item in ITEMS.values()]
    world.reader.items = {
        f"i{i:02}": ToyItem(texts[i % 5], price=i / 7, kind=kinds[i % 3]) for i in range(30)
    }
    whole = world.ranker(chunk_size=1000).rank("ann", top_k=30).ranked
    chunks = world.ranker(chunk_size=chunk_size).rank("ann", top_k=30).ranked
    assert len(whole) == 30
    assert [item.item_id for item in chunks] == [item.item_id for item in whole]
    np.testing.assert_allclose([i.score for i in chunks], [i.score for i in whole], atol=1e-6)


def test_eight_threads_get_the_same_answers(world: World) -> None:
    ranker = world.ranker(chunk_size=4)
    asked = ["ann", "bob", "idle", "nobody"] * 16
    alone = [ranker.rank(user_id) for user_id in asked[:4]] * 16
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ranker.rank, asked))
    assert together == alone


def test_threads_wait_for_one_reading_of_the_catalogue(world: World) -> None:
    ranker = world.ranker()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ranker.rank, ["ann"] * 32))
    assert world.reader.item_reads == [7]  # six items and the one that is gone


def test_old_items_are_read_again_beside_the_requests(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranker = world.ranker(item_age_s=60)
    seconds = 0.0
    monkeypatch.setattr("serving.item_cache.time.monotonic", lambda: 1000 + seconds)
    before = ranker.rank("ann", candidates=["B1"]).ranked[0].score
    world.reader.items["B1"] = replace(ITEMS["B1"], price=0.0)
    seconds = 60
    assert ranker.rank("ann", candidates=["B1"]).ranked[0].score == before
    assert len(world.reader.item_reads) == 1
    seconds = 61
    ranker.rank("ann")  # answers at once, whatever it finds
    monkeypatch.undo()
    after = before
    wait_until(lambda: len(world.reader.item_reads) == 2)
    wait_until(lambda: ranker.rank("ann", candidates=["B1"]).ranked[0].score != before)
    after = ranker.rank("ann", candidates=["B1"]).ranked[0].score
    expected = expected_logit(USERS["ann"], "B1", world.reader.items["B1"])
    assert after == pytest.approx(sigmoid(expected), abs=1e-6)
    assert ranker.refresh_items() == 6


def test_a_store_that_is_away_is_no_word_on_candidates(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranker = world.ranker()
    ranker.warm_up()

    def away(*_: object, **__: object) -> None:
        raise StoreError("away")

    monkeypatch.setattr(world.reader, "online_items", away)
    found = ranker.rank("ann", candidates=["L1", "NEW"])
    assert [item.item_id for item in found.ranked] == ["L1"]
    assert found.unknown_items == ()
    assert found.degraded == (
        "the feature store does not answer: candidates beyond the catalogue are left out",
    )
    with pytest.raises(StoreError):
        ranker.explain("ann", "NEW")
    with pytest.raises(StoreError):
        world.ranker(on_store_error="fail").rank("ann", candidates=["L1", "NEW"])


class GrowingTable(EmbeddingTable):
    """Has another table in its place from some moment on."""

    next: EmbeddingTable | None = None

    def refreshed(self) -> EmbeddingTable:  # type: ignore[override]
        return self.next or self


def growing(texts: list[str], edition: str) -> GrowingTable:
    ids = np.array(sorted(behavior_id(text) for text in texts), dtype=np.int64)
    by_id = {behavior_id(text): vector for text, vector in VECTORS.items()}
    vectors = np.zeros((len(ids) + 1, 4), dtype=np.float32)
    vectors[1:] = [by_id[int(i)] for i in ids]
    table = GrowingTable(ids, vectors, FINGERPRINT)
    table.edition = edition  # type: ignore[assignment]
    return table


def test_a_table_made_anew_never_mixes_with_rows_of_the_old_one(world: World) -> None:
    """Late candidates are looked up in the table that the request is scored with."""
    before = growing([text for text in VECTORS if text != "red lamp"], "first")
    after = growing(list(VECTORS), "second")
    world.table = before
    ranker = world.ranker()
    ranker.warm_up()
    world.reader.items["NEW"] = ToyItem("row boat", price=4.0, kind="boat")
    read = world.reader.online_items

    def read_while_the_table_changes(ids: NDArray[np.object_], **options: Any) -> ItemFeatures:
        before.next = after  # after the request has begun
        return read(ids, **options)

    world.reader.online_items = read_while_the_table_changes  # type: ignore[method-assign]
    old = ranker.rank("bob", candidates=["NEW", "B2", "L1"]).ranked
    scores = {item.item_id: item.score for item in old}
    expected = sigmoid(expected_logit(USERS["bob"], "NEW", world.reader.items["NEW"]))
    assert scores["NEW"] == pytest.approx(expected, abs=1e-6)

    def lamp() -> float:
        found = ranker.rank("ann", candidates=["L1"]).ranked
        return found[0].score

    # The lamp's title has got its vector: once all rows are looked up, every score is of it.
    whole = sigmoid(expected_logit(USERS["ann"], "L1", ITEMS["L1"]))
    wait_until(lambda: abs(lamp() - whole) < 1e-6)


def test_a_text_that_is_only_added_costs_no_looking_up(world: World) -> None:
    before = growing([text for text in VECTORS if text != "looking for a lamp"], "first")
    before.next = growing(list(VECTORS), "first")
    world.table = before
    ranker = world.ranker()
    ranker.refresh_items()
    catalogue = ranker._items.current(NOW)
    again = ranker._items.current(NOW)
    assert again.items is catalogue.items
    assert again.scorer._table is before.next
    whole = sigmoid(expected_logit(USERS["ann"], "L1", ITEMS["L1"]))
    assert ranker.rank("ann", candidates=["L1"]).ranked[0].score == pytest.approx(whole, abs=1e-6)


def test_a_store_that_is_away_leaves_the_last_items(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranker = world.ranker(item_age_s=0)
    ranker.warm_up()
    tried = threading.Event()

    def away(*_: object, **__: object) -> None:
        tried.set()
        raise StoreError("away")

    monkeypatch.setattr(world.reader, "online_items", away)
    first = ranker.rank("ann")
    wait_until(lambda: ranker.rank("ann").ranked == first.ranked and tried.is_set())


def test_the_clock_tells_the_moment(world: World) -> None:
    ranker = world.ranker()
    world.now = NOW + timedelta(days=7)
    ranking = ranker.rank("bob", top_k=1)
    assert ranking.at == world.now
    assert ranking.ranked[0].reason == "purchase before: once, 10 days ago"


class SomeNaN(nn.Module):
    """A broken model: no score for items without a price."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return inputs[8][..., 0]


def test_items_without_a_score_are_left_out_and_counted(world: World) -> None:
    ranker = world.ranker(Artifact(manifest=toy_manifest(), score=SomeNaN()))
    ranking = ranker.rank("ann", top_k=100)
    assert [item.item_id for item in ranking.ranked] == ["L1", "B1", "B2", "L2"]
    assert ranking.num_scored == 4
    assert ranking.notes == ("2 items left out: the model gave them no score",)


def test_very_sure_scores_keep_their_order(world: World) -> None:
    class Sure(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return torch.nan_to_num(inputs[8][..., 0]) * 100 + 1000

    ranker = world.ranker(Artifact(manifest=toy_manifest(), score=Sure()))
    ranked = ranker.rank("ann").ranked
    assert ranked[0].item_id == "L1"
    assert {item.score for item in ranked} == {1.0}


def test_user_view(world: World) -> None:
    view = world.ranker().user("ann")
    assert (view.known, view.at) == (True, NOW)
    assert view.totals == {"purchase": 2, "search": 1}
    assert view.dense == {"activity": 0.5}
    assert not world.ranker().user("nobody").known


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"at": datetime(2024, 1, 1)}, "at must have a time zone"),  # noqa: DTZ001
        ({"context": {"hour": 1.0}}, "context has 'hour', which run toy-run does not read; it"),
    ],
)
def test_unusable_arguments(world: World, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LongtrailError, match=sentence):
        world.ranker().rank("ann", **arguments)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"num_threads": 0}, "num_threads must be at least 1, got 0"),
        ({"item_age_s": -1.0}, "item_age_s must be at least 0 seconds"),
        ({"item_age_s": float("nan")}, "item_age_s must be at least 0 seconds"),
    ],
)
def test_unusable_config(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LongtrailError, match=sentence):
        RankerConfig(**values)


def test_threads_are_set_for_the_process(world: World) -> None:
    world.ranker(num_threads=1)
    assert torch.get_num_threads() == 1
    world.ranker(num_threads=2)
    assert torch.get_num_threads() == 2


def test_a_missing_column_is_named(world: World) -> None:
    world.reader.item_dense_names = ("purchase_count_30d", "cost")
    with pytest.raises(ArtifactError, match=r"reads feature 'price' of items, which the feature"):
        world.ranker().warm_up()
    world.reader.item_dense_names = ("purchase_count_30d", "price")
    world.reader.user_dense_names = ("other",)
    with pytest.raises(ArtifactError, match=r"reads feature 'activity' of users, which the feat"):
        world.ranker().warm_up()


def test_a_missing_scene_is_named(world: World) -> None:
    scenes = ("purchase", "view")
    manifest = toy_manifest(scenes=scenes, evidence_names=evidence_names(scenes))
    other = Artifact(manifest, world.artifact.score)
    ranker = world.ranker(other)
    with pytest.raises(ArtifactError, match=r"reads scene 'view' of users, which the feature stor"):
        ranker.warm_up()


def test_evidence_of_another_version_is_refused(world: World) -> None:
    other = Artifact(toy_manifest(evidence_names=("same_purchase_count",)), world.artifact.score)
    with pytest.raises(ArtifactError, match="toy-run reads evidence that this version does not co"):
        world.ranker(other)


def test_a_shorter_sequence_is_named(world: World) -> None:
    other = Artifact(toy_manifest(sequence_length=KEPT + 1), world.artifact.score)
    ranker = world.ranker(other)
    with pytest.raises(
        ArtifactError, match=r"reads 7 behaviours of 'purchase' per user \(6 kept\)"
    ):
        ranker.rank("ann")


class WithoutKind(ToyReader):
    def online_items(
        self, item_ids: NDArray[np.object_], *, at: datetime | None = None
    ) -> ItemFeatures:
        items = super().online_items(item_ids, at=at)
        items.categorical.clear()
        return items


def test_a_missing_category_is_named(world: World) -> None:
    world.reader = WithoutKind(USERS, ITEMS)
    with pytest.raises(ArtifactError, match=r"reads column 'kind' of items, which the feature st"):
        world.ranker().warm_up()


def test_an_empty_catalogue(world: World) -> None:
    world.reader.items = {}
    ranking = world.ranker().rank("ann")
    assert ranking.ranked == ()
    assert ranking.notes == ("nothing to rank: the feature store knows none of the items",)


def test_a_store_without_items_is_not_served(world: World) -> None:
    world.reader.items = {}
    ranker = Ranker(
        world.artifact, world.reader, world.table, toy_catalog(ITEMS), clock=lambda: NOW
    )
    with pytest.raises(MissingStepError, match="run `longtrail materialize` first"):
        ranker.warm_up()
