"""Two trained runs that several tests look at; training them once is enough."""

import pytest

from tests.training.world import make_world, small_recipe
from training.recipes import RECIPES
from training.train import train


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("train") / "home")


@pytest.fixture(scope="session")
def bahe(world):
    return train(world.sources, small_recipe(epochs=8), run="bahe", threads=1)


@pytest.fixture(scope="session")
def popularity(world):
    return train(world.sources, RECIPES["popularity"](), run="popularity", threads=1)
