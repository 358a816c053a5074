"""The commands that run local servers by hand."""

import shlex
from dataclasses import asdict

import click

from feature_repo.command import Settings, emit, pass_settings


@click.group()
def services() -> None:
    """Run PostgreSQL and Redis on this machine, for the profile production.

    A command that finds no DATABASE_URL or REDIS_URL starts what it needs and stops it at its end.
    Started here, the servers stay for the commands and programs that follow.

    Example: longtrail services start
    """


@services.command()
@pass_settings
def start(settings: Settings) -> None:
    """Start both servers; their data are in the home folder.

    Example: longtrail services start
    """
    from feature_repo.services import local

    emit(asdict(local.start(settings.home)))


@services.command()
@pass_settings
def stop(settings: Settings) -> None:
    """Stop both servers; where a command uses them, its end does.

    Example: longtrail services stop
    """
    from feature_repo.services import local

    emit(asdict(local.stop(settings.home)))


@services.command()
@pass_settings
def status(settings: Settings) -> None:
    """Say which servers run.

    Example: longtrail services status
    """
    from feature_repo.services import local

    emit(asdict(local.status(settings.home)))


@services.command()
@pass_settings
def env(settings: Settings) -> None:
    """Print shell lines, passwords included, with which the plain feast command finds the stores.

    Example: eval "$(longtrail services env)"
    """
    from feature_repo.profiles import store_variables

    variables = store_variables(settings.home, start=False)
    for name, value in variables.items():
        click.echo(f"export {name}={shlex.quote(value)}")


commands: list[click.Command] = [services]
