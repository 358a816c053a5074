"""``python -m training`` is ``longtrail train``: what ``torchrun -m training -- ...`` starts.

The ``--`` keeps torchrun from taking ``--run`` for a short form of an option of its own.
"""

import sys
from collections.abc import Sequence

import click

from longtrail import main as longtrail


def command_line(arguments: Sequence[str]) -> list[str]:
    """Arguments of ``longtrail``: its own options, wherever they stand, ``train``, the rest.

    Args:
        arguments: Options of ``longtrail`` and of ``longtrail train``, in any order.
    """
    shared = {
        name: option
        for option in longtrail.params
        if isinstance(option, click.Option)
        for name in option.opts
    }
    before: list[str] = []
    after: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        option = shared.get(argument.partition("=")[0])
        (after if option is None else before).append(argument)
        if option is not None and not option.is_flag and "=" not in argument:
            before += [value for value in [next(rest, None)] if value is not None]
    return [*before, "train", *after]


if __name__ == "__main__":
    longtrail(command_line(sys.argv[1:]), prog_name="longtrail")
