import numpy as np
import pytest
import torch

from encoders.loaded_artifact import load_artifact
from tests.training.world import make_world, small_recipe
from training.explain import explain, explain_examples
from training.impressions import load_impressions
from training.scoring import score
from training.train import read_splits, train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = make_world(tmp_path_factory.mktemp("explain"))
    train(made.sources, small_recipe(epochs=1), run="explained")
    return made


def test_the_logit_is_that_of_the_program(world):
    sources = world.sources
    rows = load_impressions(sources.home, sources.manifest, "test")
    data = read_splits(sources, small_recipe().sequence_length)["test"]
    program = load_artifact(sources.home, "explained").score
    table = sources.table.vectors

    logits = score(program, torch.from_numpy(table), data, truncate=False)
    for place in (0, len(data) // 2):
        found = explain(sources, "explained", data.impressions.take(np.array([place])))
        assert found.logit == pytest.approx(float(logits[place]), abs=1e-4)
        assert found.item_id == data.impressions.item_ids[place]
    assert len(rows) == len(data)


def test_behaviours_are_named_strongest_first(world):
    sources = world.sources
    rows = load_impressions(sources.home, sources.manifest, "test")
    examples = explain_examples(sources, "explained", rows, number=3)
    assert len(examples) == 3
    assert len({found.user_id for found in examples}) == 3
    for found in examples:
        sizes = [abs(value) for _, value in found.behaviors]
        assert sizes == sorted(sizes, reverse=True)
        assert 0 < len(sizes) <= 10
        assert all(name.split(": ")[0] in ("buy", "view") for name, _ in found.behaviors)


def test_a_user_without_a_history_is_passed_over(world):
    sources = world.sources
    rows = load_impressions(sources.home, sources.manifest, "test")
    clicked = rows.take(np.flatnonzero(rows.clicked == 1))
    there = set(world.events["user_id"])
    known = np.array([user in there for user in clicked.user_ids])
    assert not known.all()
    first = np.argmin(known)  # an unknown user, then the others
    ordered = clicked.take(np.append(first, np.flatnonzero(known)))
    (example,) = explain_examples(sources, "explained", ordered, number=1)
    assert example.user_id == ordered.user_ids[1]
    assert explain_examples(sources, "explained", ordered.take(np.array([0]))) == []


def test_one_impression_at_a_time(world):
    rows = load_impressions(world.sources.home, world.sources.manifest, "test")
    with pytest.raises(ValueError, match="one impression is explained at a time, got 2"):
        explain(world.sources, "explained", rows.take(np.arange(2)))
