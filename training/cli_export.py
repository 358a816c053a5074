"""The command export."""

from dataclasses import asdict

import click

from encoders.cli_options import threads_option
from feature_repo.command import Settings, emit, pass_settings
from feature_repo.progress import BarLine
from feature_repo.publish import publish

# torch and scikit-learn take seconds to import, and `longtrail --help` must be quick: a command
# imports the modules that need them when it runs.


@click.command(short_help="Write a model's user and item embeddings.")
@click.argument("run", required=False)
@threads_option
@pass_settings
def export(settings: Settings, run: str | None, threads: int | None) -> None:
    """Write the deep outputs of RUN (default: the one that is served) as feature views.

    Every run has two views of its own, of users and of items, beside those of other runs;
    `longtrail apply` and `longtrail materialize` bring them online.

    \b
    Example:
      longtrail export bahe_small-20260101-120000
    """  # noqa: D301  # click takes the backspace itself
    from encoders.devices import torch_threads
    from feature_repo.artifact import current_run
    from training.export import export_embeddings
    from training.sources import Sources

    run = run or current_run(settings.home)
    sources = Sources.open(settings.home, settings.profile)
    with torch_threads(threads), BarLine() as bars:
        result = export_embeddings(
            sources,
            run,
            users=bars.bar("users", "users"),
            items=bars.bar("items", "items"),
        )
    emit({**asdict(result), "seconds": round(result.seconds, 1), **publish(settings)})
