"""Options that several commands have: what a language model is, and where arithmetic is done."""

from collections.abc import Callable
from typing import Any, get_args

import click

from encoders.config import DEFAULT_MODEL, EncoderConfig, Pooling
from encoders.tracking import TRACKERS

Function = Callable[..., Any]

_model_option = click.option(
    "--model",
    default=DEFAULT_MODEL,
    show_default=True,
    metavar="NAME",
    help="The default model's package, a folder in the Hugging Face format, or a name on the hub.",
)
_split_option = click.option(
    "--split-layer",
    type=click.IntRange(min=1),
    default=None,
    show_default="3 for the default model, else half of the layers",
    help="Run the layers up to this one; the layers above are trained later.",
)
_pooling_option = click.option(
    "--pooling",
    type=click.Choice(get_args(Pooling)),
    default=EncoderConfig.pooling,
    show_default=True,
    help="How token states become one vector.",
)
_prompt_option = click.option(
    "--prompt",
    default=EncoderConfig.prompt,
    show_default=True,
    help="Template that each text is put into.",
)
_max_tokens_option = click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=EncoderConfig.max_tokens,
    show_default=True,
    help="Tokens kept of a text.",
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    show_default="OMP_NUM_THREADS, else one per core",
    help="Of the arithmetic.",
)
process_threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    show_default="OMP_NUM_THREADS of one process, else one per core, shared by the processes",
    help="Of the arithmetic, per process.",
)
cpu_option = click.option(
    "--cpu", is_flag=True, help="Use no accelerator.  [default: use one if there is]"
)
track_option = click.option(
    "--track",
    type=click.Choice(TRACKERS),
    help="Write training curves to HOME/tracking, or MLFLOW_TRACKING_URI.  [default: no]",
)


def encoder_options(function: Function) -> Function:
    """What a model is and how its states become a vector: for every command that runs one."""
    options = (
        _model_option,
        _split_option,
        _pooling_option,
        _prompt_option,
        _max_tokens_option,
        threads_option,
    )
    for option in reversed(options):
        function = option(function)
    return function
