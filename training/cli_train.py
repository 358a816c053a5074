"""The command train."""

from collections.abc import Iterable, Mapping

import click

from encoders.cli_options import cpu_option, process_threads_option, track_option
from feature_repo.command import Settings, emit, pass_settings, say
from feature_repo.progress import BarLine
from training.overrides import override
from training.recipes import RECIPES, Recipe

# torch and scikit-learn take seconds to import, and `longtrail --help` must be quick: a command
# imports the modules that need them when it runs.


def _recipe(name: str, shortcuts: Mapping[str, float | None], settings: Iterable[str]) -> Recipe:
    """A recipe with what the user overrides; ``--set`` comes after the options of one field."""
    given = [f"{field}={value}" for field, value in shortcuts.items() if value is not None]
    return override(RECIPES[name](), [*given, *settings])


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
    "--set",
    "settings_by_name",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any field of the recipe, by dotted name; may be given often.  [default: the recipe's]",
)
@track_option
@cpu_option
@click.option(
    "--deterministic", is_flag=True, help="Refuse what gives other results when repeated."
)
@click.option("--compile", "compiled", is_flag=True, help="Learn with torch.compile.")
@process_threads_option
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
    settings_by_name: tuple[str, ...],
    track: str | None,
    cpu: bool,
    deterministic: bool,
    compiled: bool,
    threads: int | None,
    make_current: bool | None,
) -> None:
    """Train a click model on the impressions and write its artifact to HOME/runs/RUN.

    A run that was killed goes on from its last checkpoint when the same command is given again, and
    ends with the same weights. Several processes train one model together under torchrun: options
    of this command follow `--`.

    \b
    Example:
      longtrail train --recipe bahe_small --epochs 3
      longtrail train --set model.deep_length=50 --set model.hidden=256,128 --track tensorboard
      torchrun --nproc_per_node=2 -m training -- --recipe bahe_base
    """  # noqa: D301  # click takes the backspace itself
    from encoders.devices import open_devices
    from training.sources import Sources
    from training.train import train as run_training

    shortcuts = {
        "training.epochs": epochs,
        "training.seed": seed,
        "training.learning_rate": learning_rate,
        "training.deterministic": deterministic or None,
        "training.compiled": compiled or None,
        "sequence_length": sequence_length,
    }
    recipe = _recipe(recipe_name, shortcuts, settings_by_name)
    sources = Sources.open(settings.home, settings.profile)
    with open_devices(cpu=cpu) as devices:
        with BarLine() as bars:
            result = run_training(
                sources,
                recipe,
                run=run,
                threads=threads,
                make_current=make_current,
                devices=devices,
                track=track,
                reading=bars.bar("reading features", "impressions"),
                learning=bars.bar(f"training {recipe.name}", "impressions"),
                scoring=bars.bar(f"scoring {recipe.name}", "impressions"),
            )
        if not devices.is_main:
            return
        if result.resumed:
            say(f"went on with the unfinished run {result.run}")
        rate = result.rows_per_s
        emit(
            {
                "run": result.run,
                "recipe": recipe.name,
                "folder": str(result.folder),
                "num_rows": result.num_rows,
                "num_contexts": result.num_contexts,
                "num_processes": result.num_processes,
                "resumed": result.resumed,
                **result.metrics,
                "rows_per_s": rate and round(rate),
                "seconds": round(result.seconds, 1),
            }
        )
