"""The commands encode and tune, and the group lm."""

import click

from encoders.cli_encode import encode
from encoders.cli_tune import tune
from encoders.lm.cli import lm

commands: list[click.Command] = [encode, tune, lm]
