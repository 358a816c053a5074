"""How often one caller may ask, by a moving window.

Each process counts for itself: N workers together let through at most N times as much.
"""

import math
import time

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from feature_repo.errors import LongtrailError


class RateLimit:
    """A number of requests per caller and window.

    Args:
        rate: As "100/second" or "5 per 10 minutes".

    Raises:
        LongtrailError: If ``rate`` is not of that form.
    """

    def __init__(self, rate: str) -> None:
        try:
            self._item: RateLimitItem = parse(rate)
        except ValueError as error:
            raise LongtrailError(
                f"a rate limit is a number of requests per time such as 100/second or 5000/minute, "
                f"got {rate!r}"
            ) from error
        if self._item.amount < 1:
            raise LongtrailError(f"a rate limit lets at least 1 request through, got {rate!r}")
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def wait_s(self, caller: str) -> int:
        """Count a request of ``caller``; 0 if it may pass, else the seconds to wait, at least 1."""
        if self._limiter.hit(self._item, caller):
            return 0
        reset = self._limiter.get_window_stats(self._item, caller).reset_time
        return max(1, math.ceil(reset - time.time()))
