"""Wait for what another thread or process does."""

import time
from collections.abc import Callable


def wait_until(
    condition: Callable[[], bool], what: str = "", *, most_s: float, poll_s: float = 0.02
) -> None:
    """Look again and again, until it is so.

    Args:
        condition: Whether it is.
        what: It, for whoever waits in vain.
        most_s: Seconds after which that is.
        poll_s: Seconds between two looks.
    """
    deadline = time.monotonic() + most_s
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(poll_s)
