"""Commands about versions: list them, serve another one, remove old ones."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from feature_repo.command import Settings, emit, pass_settings, say

# Feast takes seconds to import: the commands load what needs it inside.

if TYPE_CHECKING:
    from feature_repo.versions import Switch


@click.command()
@pass_settings
def versions(settings: Settings) -> None:
    """List encoders and runs: dates, sizes, who uses whom, which is served.

    Example: longtrail versions
    """
    from feature_repo.versions import list_versions

    emit(asdict(list_versions(settings.home)))


@click.command()
@click.argument("run")
@pass_settings
def promote(settings: Settings, run: str) -> None:
    """Serve RUN: its model, its encoder's vectors, its vectors of users and items.

    Refused where the feature store lacks what the run reads. Processes that serve notice within a
    second and change over once it is loaded; requests go on meanwhile.

    Example: longtrail promote bahe_small-20260101-120000
    """
    from feature_repo.versions import promote as run_promote

    _tell(run_promote(settings.home, settings.profile, run))


@click.command()
@pass_settings
def rollback(settings: Settings) -> None:
    """Serve the run again that was served before the last promotion or training.

    Example: longtrail rollback
    """
    from feature_repo.versions import roll_back

    _tell(roll_back(settings.home, settings.profile))


def _tell(switch: "Switch") -> None:
    if switch.to_materialize:
        say(
            f"Note: {', '.join(switch.to_materialize)} of run {switch.run} are not online yet: run "
            "`longtrail materialize`."
        )
    emit(asdict(switch))


@click.command()
@click.option(
    "--keep",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Newest runs that stay, besides the served one and the one before it.",
)
@click.option("--dry-run", is_flag=True, help="Only tell what would go.")
@pass_settings
def gc(settings: Settings, keep: int, dry_run: bool) -> None:
    """Remove old runs, vectors of encoders that no kept run needs, and their rows in the stores.

    The current encoder, the served run and the one before it always stay.

    Example: longtrail gc --keep 2 --dry-run
    """
    from feature_repo.garbage import collect_garbage

    emit(
        asdict(collect_garbage(settings.home, settings.profile, keep=keep, dry_run=dry_run))
        | {"dry_run": dry_run}
    )


commands: list[click.Command] = [versions, promote, rollback, gc]
