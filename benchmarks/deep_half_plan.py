"""What the deep-half benchmark trains: one recipe, with its deep half changed in one way each."""

from dataclasses import dataclass, replace

from benchmarks.quality_plan import SAME_BUDGET, SINGLE, Seeded, one_pass
from training.config import BaheConfig
from training.overrides import override
from training.recipes import RECIPES, Recipe

REFERENCE = "frozen"
"""What every other variant is compared with: the deep half keeps its pretrained weights."""
FROZEN = "_frozen"
"""Ends the name of a variant whose deep half, changed likewise, keeps its pretrained weights."""
RATES = (0.1, 0.3, 1.0, 3.0)
"""Highest learning rates of the deep half, as parts of the head's."""
DEPTHS = (1, 2, 3)
"""Layers of the deep half."""

_FREEZE = ("model.fine_tune=frozen", "model.num_trained_layers=none")
_FACTORS = {
    "without_next_behavior": ("model.next_behavior_weight=0",),
    "over_states": ("model.attention_over=states",),
    "without_position": ("model.position=none",),
    "without_age": ("model.use_age=false",),
}
"""Names -> settings beside which the deep half is trained and frozen."""


@dataclass(frozen=True)
class Variant:
    """One way to use the deep half."""

    settings: tuple[str, ...]
    """What makes the recipe this one, as ``longtrail train --set`` takes it."""
    frozen: str
    """Name of the variant that is the same but for a frozen deep half."""
    recipe: Recipe


def bahe_config(recipe: Recipe) -> BaheConfig:
    """The config of a recipe that can be studied.

    Raises:
        TypeError: If it is of another model.
    """
    if not isinstance(recipe.model, BaheConfig):
        raise TypeError(f"the recipe must be of a bahe model, got a {type(recipe.model).__name__}")
    return recipe.model


def recipes() -> dict[str, Recipe]:
    """What can be studied: the recipes with a deep half and target attention, by name."""
    bahe = {name: recipe() for name, recipe in RECIPES.items()}
    return {SAME_BUDGET: replace(one_pass(SINGLE), name=SAME_BUDGET)} | {
        name: recipe
        for name, recipe in bahe.items()
        if isinstance(recipe.model, BaheConfig)
        and recipe.model.use_deep_half
        and recipe.model.use_target_attention
    }


def variants(recipe: Recipe, *, num_layers: int) -> tuple[dict[str, Variant], list[str]]:
    """All variants of a recipe, the reference first.

    Args:
        recipe: One of :func:`recipes`; ``trained`` is the recipe as it is.
        num_layers: That lie above the split. The vectors hold the states of the layer below, so
            more of them need ``longtrail encode`` with a lower ``--split-layer``.

    Returns:
        Name -> variant, and why some are missing.
    """
    found: dict[str, Variant] = {}
    names: dict[Recipe, str] = {}
    notes = []
    for name, settings in _all_settings(recipe, num_layers).items():
        changed = override(recipe, settings)
        same = names.setdefault(_spelled_out(changed, num_layers), name)
        if same != name:
            notes.append(f"{name} left out: it is {same}")
            continue
        twin = _spelled_out(override(recipe, (*settings, *_FREEZE)), num_layers)
        found[name] = Variant(settings, names.get(twin, REFERENCE), changed)
    notes += [
        f"layers_{depth} left out: {num_layers} lie above the split; for more encode with a lower "
        "--split-layer"
        for depth in DEPTHS
        if depth > num_layers
    ]
    return found, notes


def _all_settings(recipe: Recipe, num_layers: int) -> dict[str, tuple[str, ...]]:
    """Name -> settings, a frozen one before those that it is the twin of."""
    chosen: dict[str, tuple[str, ...]] = {
        REFERENCE: _FREEZE,
        "without": ("model.use_deep_half=false",),
        "trained": (),
    }
    for rate in RATES:
        highest = f"{rate * recipe.training.learning_rate:g}"
        chosen[f"rate_{rate:g}"] = (f"training.deep_learning_rate={highest}",)
    depths = {
        f"layers_{depth}": (f"model.num_deep_layers={depth}",)
        for depth in DEPTHS
        if depth <= num_layers
    }
    for name, settings in (depths | _FACTORS).items():
        chosen |= {name + FROZEN: (*settings, *_FREEZE), name: settings}
    if len(depths) > 1:
        deepest = list(depths)[-1]
        chosen[f"{deepest}_top_1"] = (*depths[deepest], "model.num_trained_layers=1")
    return chosen


def _spelled_out(recipe: Recipe, num_layers: int) -> Recipe:
    """The recipe with one spelling for what means the same, to find what would be trained twice."""
    model, training = bahe_config(recipe), recipe.training
    depth = model.num_deep_layers or num_layers
    trained = model.num_trained_layers
    if model.fine_tune == "frozen":  # its learning rate means nothing
        training = replace(training, deep_learning_rate=training.learning_rate)
    model = replace(
        model,
        num_deep_layers=depth,
        num_trained_layers=None if trained == depth else trained,
    )
    return replace(recipe, model=model, training=training)


def seeded(name: str, variant: Variant, recipe: Recipe, *, num_seeds: int) -> Seeded:
    """A variant with each seed, from the recipe's on, and its run; never the one that is served."""
    first = recipe.training.seed
    return [
        (
            replace(
                variant.recipe,
                training=replace(variant.recipe.training, seed=seed),
                baseline=True,
            ),
            f"deep_half-{recipe.name}-{name}-seed{seed}",
        )
        for seed in range(first, first + num_seeds)
    ]
