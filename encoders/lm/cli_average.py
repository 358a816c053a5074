"""The commands lm average and merge."""

import click

from encoders.cli_options import threads_option
from feature_repo.command import Settings, emit, pass_settings, say
from feature_repo.progress import BarLine


@click.command(short_help="Average the weights that a pretraining kept.")
@click.argument("model", required=False)
@click.option(
    "--last",
    type=click.IntRange(min=2),
    help="Average so many of the kept weights, the last.  [default: all]",
)
@click.option("--name", help="Of the new model.  [default: MODEL-average]")
@threads_option
@pass_settings
def average(
    settings: Settings, model: str | None, last: int | None, name: str | None, threads: int | None
) -> None:
    """Average the weights that the pretraining of MODEL kept on its way.

    MODEL is one made here by name, or a folder; without it the one pretrained last is taken. Tells
    the bits per byte on the valid split of each of the weights and of their average.

    Example: longtrail lm average tiny --last 4
    """
    from encoders.devices import open_devices, torch_threads
    from encoders.lm.averaging import average as run_average
    from encoders.lm.model_folder import PRETRAINING_FILE, find_language_model, latest_model
    from encoders.lm.validation import ALL

    home = settings.home
    folder = (
        latest_model(home, PRETRAINING_FILE, made_by="longtrail lm pretrain")
        if model is None
        else find_language_model(home, model)
    )
    with open_devices() as devices, torch_threads(threads), BarLine() as bars:
        summary = run_average(
            home,
            folder,
            last=last,
            name=name,
            device=devices.device,
            progress=bars.bar("measuring", "models"),
        )
    manifest = summary.manifest
    if manifest.gain <= 0:
        say(
            f"Note: the weights of step {manifest.best_single} alone are better: average fewer "
            "with --last, or use them."
        )
    say("Next: longtrail lm tune")
    emit(
        {
            "model": summary.folder.name,
            "folder": str(summary.folder),
            "steps": manifest.steps,
            "single_bits_per_byte": {
                step: round(figures[ALL], 5) for step, figures in manifest.single.items()
            },
            "best_single": manifest.best_single,
            "average_bits_per_byte": {
                source: round(value, 5) for source, value in manifest.average.items()
            },
            "gain_bits_per_byte": round(manifest.gain, 5),
            "seconds": round(summary.seconds, 1),
        }
    )


@click.command(short_help="Go some of the way from a model to what became of it.")
@click.argument("base")
@click.argument("tuned")
@click.option(
    "--weight",
    type=click.FloatRange(min=0, max=1),
    default=0.5,
    show_default=True,
    help="Of TUNED; BASE has the rest.",
)
@click.option("--name", help="Of the new model.  [default: TUNED-merged]")
@pass_settings
def merge(settings: Settings, base: str, tuned: str, weight: float, name: str | None) -> None:
    """Interpolate the weights of BASE and of TUNED, two models of one shape and vocabulary.

    Both are models made here, by name, or folders. The more weight TUNED has, the more of what it
    learned is kept, and the less of what BASE knew.

    Example: longtrail lm merge tiny tiny-continued --weight 0.7
    """
    from encoders.lm.merging import merge as run_merge
    from encoders.lm.model_folder import find_language_model

    home = settings.home
    summary = run_merge(
        home,
        find_language_model(home, base),
        find_language_model(home, tuned),
        weight=weight,
        name=name,
    )
    manifest = summary.manifest
    emit(
        {
            "model": summary.folder.name,
            "folder": str(summary.folder),
            "base_model": manifest.base_model,
            "tuned_model": manifest.tuned_model,
            "weight": manifest.weight,
            "seconds": round(summary.seconds, 1),
        }
    )


commands: list[click.Command] = [average, merge]
