"""Deterministic mode: repeated runs give the same bits, and what could not is refused."""

from dataclasses import replace

import pytest
import torch

from encoders.devices import deterministic_algorithms
from feature_repo.artifact import WEIGHTS_FILE
from tests.training.world import LENGTH, World, make_world
from training.recipes import RECIPES, Recipe, TrainingConfig
from training.train import train


def quick_recipe(*, deterministic: bool) -> Recipe:
    """Quickly exported; gradients of one row of a learned table come from many places."""
    training = TrainingConfig(epochs=1, batch_contexts=16, deterministic=deterministic)
    return replace(RECIPES["din_ids"](), training=training, sequence_length=LENGTH)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("deterministic") / "home", num_users=60)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The mode tells CUDA's library something for the rest of a process: not beyond a test."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def modes_while_learning(world: World, recipe: Recipe, run: str) -> set[bool]:
    """Train; whether the mode was on whenever rows had been learned from."""
    seen = set()

    def learning(advance: int, total: int, **figures: float) -> None:
        seen.add(torch.are_deterministic_algorithms_enabled())

    train(world.sources, recipe, run=run, threads=1, make_current=False, learning=learning)
    return seen


def test_two_runs_give_the_same_bits_and_the_mode_ends_with_them(world):
    recipe = quick_recipe(deterministic=True)
    assert modes_while_learning(world, recipe, "first") == {True}
    assert not torch.are_deterministic_algorithms_enabled()
    torch.rand(3)  # what was drawn before a run is nothing to it
    assert modes_while_learning(world, recipe, "second") == {True}
    first, second = (
        (world.sources.home.runs / run / WEIGHTS_FILE).read_bytes() for run in ("first", "second")
    )
    assert first == second


def test_the_mode_is_off_unless_asked_for_and_ends_with_an_error(world):
    def stop(advance: int, total: int, **figures: float) -> None:
        raise InterruptedError(str(torch.are_deterministic_algorithms_enabled()))

    for wanted in (False, True):
        recipe = quick_recipe(deterministic=wanted)
        with pytest.raises(InterruptedError, match=str(wanted)):
            train(world.sources, recipe, run=f"stopped-{wanted}", threads=1, learning=stop)
        assert not torch.are_deterministic_algorithms_enabled()


def test_operations_without_a_repeatable_form_are_refused():
    def put() -> None:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))

    with deterministic_algorithms(wanted=False):
        put()
    with (
        deterministic_algorithms(wanted=True),
        pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"),
    ):
        put()


def test_who_had_the_mode_on_keeps_it():
    torch.use_deterministic_algorithms(mode=True)
    try:
        for wanted in (False, True):
            with deterministic_algorithms(wanted):
                assert torch.are_deterministic_algorithms_enabled()
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(mode=False)
