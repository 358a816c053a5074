"""The commands train, evaluate and export."""

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import click

from feature_repo.command import Settings, emit, pass_settings, say
from feature_repo.progress import Progress, progress_bar
from training.recipes import RECIPES, Recipe

# torch and scikit-learn take seconds to import, and `longtrail --help` must be quick: the commands
# import the modules that need them when they run. training.recipes imports neither.


def _bar(stack: ExitStack, what: str, unit: str) -> Progress:
    """A progress bar that appears with its first news, so that two steps do not share a line."""
    bars: list[Progress] = []

    def update(advance: int, total: int, **figures: float) -> None:
        if not bars:
            bars.append(stack.enter_context(progress_bar(what, unit)))
        bars[0](advance, total, **figures)

    return update


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
            reading=_bar(bars, "reading features", "impressions"),
            learning=_bar(bars, f"training {recipe.name}", "impressions"),
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


@click.command(short_help="Measure a trained model.")
@click.argument("run", required=False)
@click.option(
    "--split",
    type=click.Choice(["train", "valid", "test"]),
    default="test",
    show_default=True,
    help="Which of the data set's impressions.",
)
@click.option(
    "--impressions",
    type=click.Path(path_type=Path),
    help="A labelled parquet or CSV file to score instead: request_id, user_id, item_id, "
    "event_timestamp, clicked.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Of the arithmetic.  [default: one per core]"
)
@pass_settings
def evaluate(
    settings: Settings, run: str | None, split: str, impressions: Path | None, threads: int | None
) -> None:
    r"""Measure RUN (default: the one that is served) by its exported program, as it is served.

    Prints AUC with a user-level bootstrap interval, GAUC, logloss, normalised entropy and
    calibration error, on all rows and on slices.

    \b
    Example:
      longtrail evaluate bahe_small-20260101-120000 --impressions labels.csv
    """
    from feature_repo.artifact import current_run
    from training.evaluate import evaluate as run_evaluation
    from training.sources import Sources
    from training.train import torch_threads

    run = run or current_run(settings.home)
    sources = Sources.open(settings.home, settings.profile)
    with torch_threads(threads), ExitStack() as bars:
        result = run_evaluation(
            sources,
            run,
            split=split,
            impressions=impressions,
            reading=_bar(bars, "reading features", "impressions"),
            scoring=_bar(bars, "scoring", "impressions"),
        )
    for note in result.notes:
        say(f"Note: {note}")
    emit({**asdict(result), "seconds": round(result.seconds, 1)})


@click.command(short_help="Write a model's user and item embeddings.")
@click.argument("run", required=False)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Of the arithmetic.  [default: one per core]"
)
@pass_settings
def export(settings: Settings, run: str | None, threads: int | None) -> None:
    r"""Write the deep outputs of RUN (default: the one that is served) as feature views.

    The views user_embeddings and item_embeddings then hold this version for every user and item;
    `longtrail materialize` brings them online.

    \b
    Example:
      longtrail export bahe_small-20260101-120000
    """
    from feature_repo.artifact import current_run
    from training.export import export_embeddings
    from training.sources import Sources
    from training.train import torch_threads

    run = run or current_run(settings.home)
    sources = Sources.open(settings.home, settings.profile)
    with torch_threads(threads), ExitStack() as bars:
        result = export_embeddings(
            sources, run, users=_bar(bars, "users", "users"), items=_bar(bars, "items", "items")
        )
    emit({**asdict(result), "seconds": round(result.seconds, 1)})


commands: list[click.Command] = [train, evaluate, export]
