"""The command train."""

from contextlib import ExitStack
from dataclasses import replace

import click

from feature_repo.command import Settings, emit, pass_settings, say
from feature_repo.progress import late_bar
from training.recipes import RECIPES, Recipe

# torch and scikit-learn take seconds to import, and `longtrail --help` must be quick: a command
# imports the modules that need them when it runs.


def _recipe(
    name: str,
    epochs: int | None,
    seed: int | None,
    sequence_length: int | None,
    learning_rate: float | None,
) -> Recipe:
    """A recipe with what the user overrides."""
    recipe = RECIPES[name]()
    training = replace(
        recipe.training,
        epochs=recipe.training.epochs if epochs is None else epochs,
        seed=recipe.training.seed if seed is None else seed,
        learning_rate=recipe.training.learning_rate if learning_rate is None else learning_rate,
    )
    length = recipe.sequence_length if sequence_length is None else sequence_length
    return replace(recipe, training=training, sequence_length=length)


@click.command(short_help="Train a click model.")
@click.option(
    "--recipe",
    "recipe_name",
    type=click.Choice(sorted(RECIPES)),
    default="bahe_small",
    show_default=True,
    help="What to train.",
)
@click.option("--run", help="Name of the run.  [default: <recipe>-<YYYYMMDD-HHMMSS>]")
@click.option(
    "--epochs", type=click.IntRange(min=1), help="Passes over the data.  [default: the recipe's]"
)
@click.option(
    "--seed", type=click.IntRange(min=0), help="Of all randomness.  [default: the recipe's]"
)
@click.option(
    "--sequence-length",
    type=click.IntRange(min=1),
    help="Behaviours per scene.  [default: the recipe's]",
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Highest.  [default: the recipe's]",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Of the arithmetic.  [default: one per core]"
)
@click.option(
    "--current/--no-current",
    "make_current",
    default=None,
    help="Make this the run that is served.  [default: unless it is a baseline]",
)
@pass_settings
def train(
    settings: Settings,
    recipe_name: str,
    run: str | None,
    epochs: int | None,
    seed: int | None,
    sequence_length: int | None,
    learning_rate: float | None,
    threads: int | None,
    make_current: bool | None,
) -> None:
    r"""Train a click model on the impressions and write its artifact to HOME/runs/RUN.

    A run that was killed goes on from its last full epoch when the same command is given again.

    \b
    Example:
      longtrail train --recipe bahe_small --epochs 3
    """
    from training.sources import Sources
    from training.train import train as run_training

    recipe = _recipe(recipe_name, epochs, seed, sequence_length, learning_rate)
    sources = Sources.open(settings.home, settings.profile)
    with ExitStack() as bars:
        result = run_training(
            sources,
            recipe,
            run=run,
            threads=threads,
            make_current=make_current,
            reading=late_bar(bars, "reading features", "impressions"),
            learning=late_bar(bars, f"training {recipe.name}", "impressions"),
        )
    if result.resumed:
        say(f"went on with the unfinished run {result.run}")
    emit(
        {
            "run": result.run,
            "recipe": recipe.name,
            "folder": str(result.folder),
            "num_rows": result.num_rows,
            "num_contexts": result.num_contexts,
            "resumed": result.resumed,
            **result.metrics,
            "seconds": round(result.seconds, 1),
        }
    )
