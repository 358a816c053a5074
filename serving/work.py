"""Threads for what takes milliseconds, so that the event loop answers everyone meanwhile.

More work than the threads can do waits, but not without end: a request that would wait too long is
refused at once, and its caller can ask another server or come back.
"""

from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread

from feature_repo.errors import LongtrailError

T = TypeVar("T")


class OverloadedError(LongtrailError):
    """Too much is waiting already."""


class WorkPool:
    """A bounded number of threads with a bounded queue before them.

    Args:
        threads: Pieces of work that run side by side, at least 1.
        max_waiting: Pieces that may wait for a thread, at least 0.

    Raises:
        LongtrailError: If a number is too small.
    """

    def __init__(self, *, threads: int, max_waiting: int) -> None:
        if threads < 1 or max_waiting < 0:
            raise LongtrailError(
                f"at least 1 thread and 0 waiting requests are needed, got {threads} and "
                f"{max_waiting}"
            )
        self._limiter = anyio.CapacityLimiter(threads)
        self._most = threads + max_waiting
        self._taken = 0

    async def run(self, work: Callable[[], T]) -> T:
        """Run ``work`` in a thread.

        Raises:
            OverloadedError: If as much waits already as may.
        """
        if self._taken >= self._most:
            raise OverloadedError("overloaded: too many requests are waiting; try again shortly")
        self._taken += 1
        try:
            return await anyio.to_thread.run_sync(work, limiter=self._limiter)
        finally:
            self._taken -= 1
