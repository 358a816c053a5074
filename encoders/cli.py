"""The commands encode and tune."""

import click

from encoders.cli_encode import encode
from encoders.cli_tune import tune

commands: list[click.Command] = [encode, tune]
