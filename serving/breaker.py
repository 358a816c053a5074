"""A circuit breaker around the online store: one that is away is asked seldom, not by everyone.

Without it every request of a store that hangs waits for the store's time limit, and all threads
wait with it. pybreaker keeps the state; it runs what it guards under a lock, so the lookups
themselves run outside of it, and only their outcomes are told to it.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Literal, TypeVar, cast

import numpy as np
import pybreaker
from numpy.typing import NDArray

from feature_repo.errors import LongtrailError, StoreError
from feature_repo.features import ItemFeatures, OnlineReader, UserFeatures

State = Literal["closed", "open", "half-open"]

FAIL_MAX = 5
RESET_S = 2.0
SLOW_S = 0.5
"""A lookup takes 0.2 ms, and a hundred times that on a machine that is overloaded itself."""
_SOON_S = 0.1
"""While one call tries the store."""
_T = TypeVar("_T")

_log = logging.getLogger(__name__)


class CircuitOpenError(StoreError):
    """The store was not asked, because it failed just now.

    Args:
        reason: A sentence.
        retry_after_s: Seconds until it is asked again, above 0.
    """

    def __init__(self, reason: str, *, retry_after_s: float) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class _SlowAnswerError(StoreError):
    """Tells the breaker of an answer that came, but late."""


class Breaker:
    """Asks a store until it fails time after time, then only tries it now and then.

    Closed, every call goes to the store. After ``fail_max`` failures in a row it is open: calls
    fail at once. ``reset_s`` later it is half-open: one call goes to the store while the others
    still fail; its success closes the breaker, its failure opens it for as long again.

    A failure is a :class:`StoreError`, or an answer that took more than ``slow_s``, which is given
    all the same. How long a call waits for a store that hangs is the store's own time limit.

    Args:
        name: What is asked, for the log; as in "the online store".
        fail_max: Failures in a row that open it, at least 1.
        reset_s: Seconds that it stays open, above 0.
        slow_s: Most seconds of a good answer, above 0.

    Raises:
        LongtrailError: If a number is out of its range.
    """

    def __init__(
        self,
        name: str = "the online store",
        *,
        fail_max: int = FAIL_MAX,
        reset_s: float = RESET_S,
        slow_s: float = SLOW_S,
    ) -> None:
        if fail_max < 1:
            raise LongtrailError(f"fail_max must be at least 1, got {fail_max}")
        for option, value in (("reset_s", reset_s), ("slow_s", slow_s)):
            if not value > 0:
                raise LongtrailError(f"{option} must be above 0 seconds, got {value}")
        self._name = name
        self._slow_s = slow_s
        self._reset_s = reset_s
        self._watch = _Watch(name)
        self._breaker = pybreaker.CircuitBreaker(
            fail_max=fail_max,
            reset_timeout=reset_s,
            exclude=[lambda error: not isinstance(error, StoreError)],
            listeners=[self._watch],
            throw_new_error_on_trip=False,
        )
        self._probe = threading.Lock()

    @property
    def state(self) -> State:
        """``half-open`` while one call tries a store that failed."""
        return cast(State, self._breaker.current_state)

    @property
    def num_failures(self) -> int:
        """Failures since the process began, slow answers included."""
        return self._watch.num_failures

    @property
    def num_opened(self) -> int:
        """How often the store was found to be away since the process began."""
        return self._watch.num_opened

    def guard(self, read: Callable[[], _T], *, may_be_slow: bool = False) -> _T:
        """Ask the store, if it is time to.

        Args:
            read: Asks it.
            may_be_slow: Whether an answer that takes more than ``slow_s`` is as good as any.

        Raises:
            CircuitOpenError: If it was not asked.
            StoreError: If it was asked and failed.
        """
        if self._breaker.current_state == pybreaker.STATE_CLOSED:
            return self._asked(read, may_be_slow=may_be_slow)
        wait_s = self._watch.opened_at + self._reset_s - time.monotonic()
        if wait_s > 0 or not self._probe.acquire(blocking=False):
            wait_s = max(wait_s, _SOON_S)
            raise CircuitOpenError(
                f"{self._watch.reason}; the store is tried again in {wait_s:.1f} s",
                retry_after_s=wait_s,
            )
        try:
            if self._breaker.current_state == pybreaker.STATE_OPEN:
                self._breaker.half_open()
            return self._asked(read, may_be_slow=may_be_slow)
        finally:
            self._probe.release()

    def _asked(self, read: Callable[[], _T], *, may_be_slow: bool) -> _T:
        start = time.perf_counter()
        try:
            result = read()
        except StoreError as error:
            self._report(error)
            raise
        seconds = time.perf_counter() - start
        if seconds > self._slow_s and not may_be_slow:
            self._report(_SlowAnswerError(f"{self._name} took {seconds:.2f} s to answer"))
        elif self._breaker.fail_counter:  # nothing to forgive otherwise, and no lock to wait for
            self._report(None)
        return result

    def _report(self, error: StoreError | None) -> None:
        """Tell pybreaker of an outcome; one that comes when it has just opened says nothing new."""

        def again() -> None:
            if error is not None:
                raise error

        with suppress(StoreError, pybreaker.CircuitBreakerError):
            self._breaker.call(again)


class BreakerReader(Breaker):
    """Reads the online store through a breaker; answers about users are the ones that can be slow.

    Args:
        reader: Reads the online store.
        fail_max: See :class:`Breaker`.
        reset_s: See there.
        slow_s: See there.

    Raises:
        LongtrailError: If a number is out of its range.
    """

    def __init__(
        self,
        reader: OnlineReader,
        *,
        fail_max: int = FAIL_MAX,
        reset_s: float = RESET_S,
        slow_s: float = SLOW_S,
    ) -> None:
        super().__init__(fail_max=fail_max, reset_s=reset_s, slow_s=slow_s)
        self._reader = reader

    def online_users(
        self, user_ids: NDArray[np.object_], *, at: datetime | None = None
    ) -> UserFeatures:
        """Users as they are known at ``at``; see :meth:`guard` for errors."""
        return self.guard(lambda: self._reader.online_users(user_ids, at=at))

    def online_items(
        self, item_ids: NDArray[np.object_], *, at: datetime | None = None
    ) -> ItemFeatures:
        """Items as they are known at ``at``; see :meth:`guard` for errors.

        They are read in bulk and seldom while a request waits, so they may take their time.
        """
        return self.guard(lambda: self._reader.online_items(item_ids, at=at), may_be_slow=True)


class _Watch(pybreaker.CircuitBreakerListener):
    """Counts and tells; pybreaker calls it under its lock."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.num_failures = 0
        self.num_opened = 0
        self.opened_at = 0.0  # by the clock that never jumps, unlike pybreaker's
        self.reason = ""

    def failure(self, cb: pybreaker.CircuitBreaker, exc: BaseException) -> None:  # noqa: ARG002
        self.num_failures += 1
        self.reason = str(exc)

    def state_change(
        self,
        cb: pybreaker.CircuitBreaker,  # noqa: ARG002
        old_state: pybreaker.CircuitBreakerState | None,
        new_state: pybreaker.CircuitBreakerState,
    ) -> None:
        if new_state.name == pybreaker.STATE_OPEN:
            self.opened_at = time.monotonic()
            if old_state is None or old_state.name != pybreaker.STATE_HALF_OPEN:
                self.num_opened += 1
                _log.warning("%s is left alone for a while: %s", self._name, self.reason)
        elif new_state.name == pybreaker.STATE_CLOSED:
            _log.warning("%s answers again", self._name)
