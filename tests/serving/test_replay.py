"""Scores of served requests, computed again from the features that the store has for them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from feature_repo.errors import ArtifactError
from feature_repo.home import Home
from feature_repo.served_files import read_served, served_files
from feature_repo.served_parity import Replayed
from feature_repo.served_rows import ServedRequest
from serving.replay import TOLERANCE, ScoreReplay, open_scorer
from serving.scoring import Scorer
from serving.served_log import ServedLog
from tests.serving.conftest import ITEMS, RUN, World


@pytest.fixture
def request_of_ann(world: World, tmp_path: Path) -> ServedRequest:
    """Ranked, logged and read again."""
    home = Home(tmp_path / "log")
    log = ServedLog(home.served, share=1.0)
    log.record(world.ranker().rank("ann", context={"slot": 0.5}), {"slot": 0.5}, "r1")
    log.close()
    (request,) = read_served(served_files(home)[0], {"r1"})
    return request


def replayed(world: World, request: ServedRequest) -> Replayed:
    """What a store says that is as it was."""
    return Replayed(
        request=request,
        user=world.reader.online_users(request.user.user_ids),
        items=world.reader.online_items(request.items.item_ids),
    )


@pytest.fixture
def scores(world: World) -> ScoreReplay:
    def scorer(run: str) -> Scorer:
        if run != RUN:
            raise ArtifactError(f"there is no run {run!r}")
        return Scorer(world.artifact, world.table, chunk_size=4)

    return ScoreReplay(scorer)


def test_equal_features_give_equal_scores(
    world: World, request_of_ann: ServedRequest, scores: ScoreReplay
) -> None:
    scores.compare(replayed(world, request_of_ann))
    assert (scores.parity.values, scores.parity.wrong) == (len(ITEMS), 0)
    assert scores.max_difference <= TOLERANCE
    assert scores.without_model == 0


def test_another_history_or_context_gives_other_scores(
    world: World, request_of_ann: ServedRequest, scores: ScoreReplay
) -> None:
    scores.compare(replayed(world, replace(request_of_ann, context={"slot": 0.6})))
    assert scores.parity.mismatches == len(ITEMS)
    assert 0.001 < scores.max_difference < 0.1
    # One search less: of what is unlike it the score stays.
    world.reader.users["ann"] = replace(
        world.reader.users["ann"],
        events=tuple(e for e in world.reader.users["ann"].events if e[0] != "search"),
        activity=0.75,  # as much in sum: 2 x 0.75 = 3 x 0.5
    )
    before = scores.parity.mismatches
    scores.compare(replayed(world, request_of_ann))
    assert scores.parity.mismatches == before + 4  # lamps and boats; no anvil
    told = scores.parity.differences[0]
    assert (told["feature"], told["key"].endswith("(request r1)")) == ("score", True)


def test_a_difference_within_the_tolerance_is_none(
    world: World, request_of_ann: ServedRequest, scores: ScoreReplay
) -> None:
    items = request_of_ann.items
    near = replace(
        request_of_ann, items=replace(items, logits=items.logits + np.float32(1e-5))
    )  # of a score at most a fourth of it
    scores.compare(replayed(world, near))
    assert scores.parity.wrong == 0
    assert 1e-6 < scores.max_difference <= TOLERANCE
    far = replace(request_of_ann, items=replace(items, logits=items.logits + np.float32(1e-3)))
    scores.compare(replayed(world, far))
    assert scores.parity.mismatches > 0


def test_requests_of_a_run_that_is_gone_are_counted(
    world: World,
    request_of_ann: ServedRequest,
    scores: ScoreReplay,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for _ in range(2):
        scores.compare(replayed(world, replace(request_of_ann, run="gone")))
    assert (scores.without_model, scores.parity.values) == (2, 0)
    assert caplog.text.count("scores of run gone are not compared") == 1
    with pytest.raises(ArtifactError, match="there is no run 'gone'"):
        open_scorer(world.home, "gone")
