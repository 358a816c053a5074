"""What all commands share: their settings, their one line of output, their sentence on errors."""

import errno
import json
import os
import re
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


_FULL_DISK = re.compile(
    "|".join(
        (
            *(
                re.escape(os.strerror(number))
                for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            ),
            "disk is full",  # SQLite's own words
            r"^\d+ requested and \d+ written$",  # numpy's, which drops the system's
        )
    )
)

pass_settings = click.make_pass_decorator(Settings)


def emit(result: dict[str, Any]) -> None:
    """Print a command's result: one JSON line on stdout."""
    click.echo(json.dumps(result, default=str, ensure_ascii=False))


def rounded(figure: float | None) -> float | None:
    """A figure as results show it: four decimals; None where there is none."""
    return None if figure is None else round(figure, 4)


def say(text: str) -> None:
    """Tell a person something: stderr."""
    click.echo(text, err=True)


class SentenceGroup(click.Group):
    """A group whose commands answer a user's mistake with one sentence and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; our errors, a full disk and a failing database become a sentence."""
        try:
            return super().invoke(ctx)
        except LongtrailError as error:
            say(f"Error: {error}")
            sys.exit(1)
        except Exception as error:
            sentence = _full_disk_sentence(error) or _database_sentence(error)
            if sentence is None:
                raise
            say(f"Error: {sentence}")
            sys.exit(1)


def _full_disk_sentence(error: Exception) -> str | None:
    reason = full_disk(error)
    if reason is None:
        return None
    return (
        f"a disk is full ({reason}): free some space, then run this again; what was finished "
        "before is kept"
    )


def _database_sentence(error: Exception) -> str | None:
    # SQLAlchemy takes long to import: only a command that failed needs it.
    from feature_repo.database_errors import database_trouble

    return database_trouble(error)


def full_disk(error: BaseException) -> str | None:
    """What an error says of a full disk, a quota or a limit, in one line; None where it does not.

    Every library has an error of its own for it, but they all keep the system's words.
    """
    seen: BaseException | None = error
    while seen is not None:
        for line in str(seen).splitlines():
            if _FULL_DISK.search(line):
                return line.strip()
        seen = seen.__cause__ or seen.__context__
    return None
