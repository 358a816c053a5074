"""The commands of this folder; each has a module of its own."""

import click

from training.cli_drift import drift
from training.cli_evaluate import evaluate
from training.cli_export import export
from training.cli_train import train

commands: list[click.Command] = [train, evaluate, export, drift]
