"""Stops the local servers of a command that was ended by SIGKILL, or with no time to do it itself.

A process of its own, `python -m feature_repo.services.watch HOME`, whose input is a pipe that the
command alone holds: whatever ends the command closes it. Until then it sleeps, with nothing
imported that it does not need for that.
"""

import sys
from pathlib import Path

RELEASED = b"released"
"""What a command says that has stopped the servers itself, or left them to another."""


def watch(home: str) -> None:
    """Wait for the command's end; stop the servers of a home where it did not."""
    if sys.stdin.buffer.read() == RELEASED:
        return
    from feature_repo.home import Home
    from feature_repo.services import local

    local.stop_if_unused(Home(Path(home)))


if __name__ == "__main__":
    watch(sys.argv[1])
