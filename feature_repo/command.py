"""What all commands share: their settings, their one line of output, their sentence on errors."""

import json
import sys
from dataclasses import dataclass
from typing import Any

import click

from feature_repo.errors import LongtrailError
from feature_repo.home import Home


@dataclass(frozen=True)
class Settings:
    """The options of ``longtrail`` itself, which every command reads."""

    home: Home
    profile: str
    """Name of a yaml file in ``feature_repo/``, ``embedded`` being ``feature_store.yaml``."""


pass_settings = click.make_pass_decorator(Settings)


def emit(result: dict[str, Any]) -> None:
    """Print a command's result: one JSON line on stdout."""
    click.echo(json.dumps(result, default=str, ensure_ascii=False))


def say(text: str) -> None:
    """Tell a person something: stderr."""
    click.echo(text, err=True)


class SentenceGroup(click.Group):
    """A group whose commands answer a user's mistake with one sentence and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a :class:`LongtrailError` becomes its sentence."""
        try:
            return super().invoke(ctx)
        except LongtrailError as error:
            say(f"Error: {error}")
            sys.exit(1)
