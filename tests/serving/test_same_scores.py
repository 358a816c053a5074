"""The score that serving gives is that of offline evaluation for the same moment, on every path."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from encoders.inputs import history_keys, user_inputs
from encoders.loaded_artifact import Artifact, load_artifact
from feature_repo.catalog import Catalog
from feature_repo.features import ItemFeatures, KeptOutputs, UserFeatures
from serving.ranker import Ranker
from tests.training.world import LENGTH, SCENES, World, make_world, small_recipe
from training.dataset import ClickData, read_clicks
from training.impressions import load_impressions
from training.scoring import score
from training.train import train

SPLITS = ("train", "valid", "test")


class KeepingReader:
    """Gives along the deep outputs that every user had some time before, as a store would."""

    def __init__(self, world: World, artifact: Artifact) -> None:
        self._reader = world.sources.reader
        self._table = world.sources.table
        self._artifact = artifact
        self.before = timedelta(0)

    def online_users(
        self, user_ids: NDArray[np.object_], *, at: datetime | None = None
    ) -> UserFeatures:
        assert at is not None
        users = self._reader.online_users(user_ids, at=at)
        parts = self._artifact.parts
        assert parts is not None
        earlier = self._reader.online_users(user_ids, at=at - self.before)
        inputs = user_inputs(earlier, self._table, scenes=SCENES)
        newest = inputs.last(LENGTH)
        outputs = parts.users(
            torch.from_numpy(self._table.vectors),
            torch.from_numpy(np.ascontiguousarray(newest.history_rows)),
            torch.from_numpy(np.ascontiguousarray(newest.history_ages)),
        )
        kept = KeptOutputs(
            outputs.detach().flatten(1).numpy(),
            history_keys(earlier, inputs, SCENES, parts.form.deep_length),
            earlier.request_times // 1_000_000,
        )
        return replace(users, outputs=kept)

    def online_items(
        self, item_ids: NDArray[np.object_], *, at: datetime | None = None
    ) -> ItemFeatures:
        return self._reader.online_items(item_ids, at=at)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("scores") / "home", num_users=130)
    train(world.sources, small_recipe(epochs=1), run="bahe", threads=1)
    return world


@pytest.fixture(scope="module")
def offline(world: World) -> dict[tuple[str, str], float]:
    """Request and item -> logit of offline evaluation."""
    sources, logits = world.sources, {}
    program = load_artifact(sources.home, "bahe").score
    for split in SPLITS:
        data: ClickData = read_clicks(
            load_impressions(sources.home, sources.manifest, split),
            sources.reader,
            sources.table,
            scenes=SCENES,
            sequence_length=LENGTH,
        )
        found = score(program, torch.from_numpy(sources.table.vectors), data, truncate=False)
        rows = data.impressions
        keys = zip(rows.request_ids.tolist(), rows.item_ids.tolist(), strict=True)
        logits.update(zip(keys, found.tolist(), strict=True))
    return logits


def requests(world: World) -> Iterator[tuple[str, str, datetime, list[str]]]:
    for request_id, rows in world.impressions.groupby("request_id"):
        first = rows.iloc[0]
        yield (
            request_id,
            first["user_id"],
            first["event_timestamp"].to_pydatetime(),
            list(rows["item_id"]),
        )


@pytest.mark.parametrize(
    ("before", "paths"),
    [
        (None, {"whole"}),
        (timedelta(days=9), {"live", "cached"}),  # before most had any history
        (timedelta(0), {"cached"}),
        # An age of two hours is where a step lies; of every user's two requests one is there.
        (timedelta(seconds=40), {"live", "cached"}),
    ],
    ids=["whole", "stale", "cached", "a step in age"],
)
def test_serving_scores_what_evaluation_scores(
    world: World,
    offline: dict[tuple[str, str], float],
    before: timedelta | None,
    paths: set[str],
) -> None:
    sources = world.sources
    artifact = load_artifact(sources.home, "bahe")
    reader = KeepingReader(world, artifact)
    reader.before = before or timedelta(0)
    ranker = Ranker(
        replace(artifact, parts=None) if before is None else artifact,
        reader,
        sources.table,
        Catalog.load(sources.home),
        clock=sources.manifest.now,
    )
    taken: Counter[str] = Counter()
    num_rows = 0
    for request_id, user_id, at, items in requests(world):
        ranker.refresh_items(at)
        ranking = ranker.rank(user_id, candidates=items, at=at, context={"hour": 12.0})
        assert len(ranking.ranked) == len(items)
        taken[ranking.path] += 1
        for item in ranking.ranked:
            expected = 1 / (1 + np.exp(-offline[request_id, item.item_id]))
            assert item.score == pytest.approx(expected, abs=1e-5), (request_id, item)
            num_rows += 1
    assert num_rows >= 1000
    assert set(taken) == paths
    if len(paths) > 1:
        assert min(taken.values()) >= 10, taken
