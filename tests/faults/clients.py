"""Clients that ask the real service, whatever happens to it."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx

from tests.live_service import PATIENCE_S, wait_until

_RETRY_S = 0.05
_PAUSE_S = 0.01
"""Between rankings: load, not a machine that is out of breath."""
_BATCH_EVENTS = 3

Event = dict[str, str]


class Clients:
    """Callers who post events and rank at the same time, each in a thread of its own.

    A writer sends a batch again until it is acknowledged, then the next one. Answers that no caller
    should ever get are an error, told by :meth:`end`.

    Args:
        url: Of the service.
        events: What is posted, every writer the next ones.
        users: Whose rankings are asked for.
        num_writers: At least 1.
        num_readers: At least 1.
    """

    def __init__(
        self,
        url: str,
        events: Iterator[Event],
        users: Sequence[str],
        *,
        num_writers: int = 2,
        num_readers: int = 2,
    ) -> None:
        self._url = url
        self._events = events
        self._users = users
        self._lock = threading.Lock()
        self._is_ending = False
        self.acknowledged: list[Event] = []
        """Events that the service said it has."""
        self.outcomes: Counter[tuple[str, str]] = Counter()
        """Address and ``whole``, ``degraded``, ``later`` (503) or ``cut`` -> how often."""
        self._pool = ThreadPoolExecutor(num_writers + num_readers)
        self._running: list[Future[None]] = [
            *(self._pool.submit(self._write) for _ in range(num_writers)),
            *(self._pool.submit(self._read, number) for number in range(num_readers)),
        ]

    def wait_for_more(self, number: int) -> None:
        """Wait until so many more events are acknowledged, and as many whole rankings came."""
        events, ranked = len(self.acknowledged), self.outcomes["/v1/rank", "whole"]
        self.wait_until(lambda: len(self.acknowledged) >= events + number, f"{number} events")
        self.wait_until(
            lambda: self.outcomes["/v1/rank", "whole"] >= ranked + number, f"{number} rankings"
        )

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for what the clients should see; an error of one of them ends it."""

        def found() -> bool:
            for one in self._running:
                if one.done():
                    one.result()
            return condition()

        wait_until(found, f"{what}; so far {dict(self.outcomes)}")

    def end(self) -> None:
        """Let every writer have its batch acknowledged, and end.

        Raises:
            AssertionError: If an answer was neither 200 nor 503 with Retry-After.
        """
        self._is_ending = True
        self._pool.shutdown()
        for one in self._running:
            one.result()

    def _write(self) -> None:
        with httpx.Client(base_url=self._url, timeout=PATIENCE_S) as client:
            while not self._is_ending:
                with self._lock:
                    batch = [next(self._events) for _ in range(_BATCH_EVENTS)]
                deadline = time.monotonic() + PATIENCE_S
                while (answer := self._ask(client, "/v1/events", {"events": batch})) is None:
                    assert time.monotonic() < deadline, f"never taken: {batch}"
                    time.sleep(_RETRY_S)
                assert answer["accepted"] + answer["duplicates"] == len(batch), answer
                self.acknowledged += batch

    def _read(self, number: int) -> None:
        with httpx.Client(base_url=self._url, timeout=PATIENCE_S) as client:
            turn = number
            while not self._is_ending:
                user_id = self._users[turn % len(self._users)]
                turn += 1
                answer = self._ask(client, "/v1/rank", {"user_id": user_id, "top_k": 5})
                time.sleep(_RETRY_S if answer is None else _PAUSE_S)

    def _ask(self, client: httpx.Client, path: str, body: Any) -> dict[str, Any] | None:
        """What it answered; None where the caller has to come again."""
        try:
            response = client.post(path, json=body)
        except (httpx.NetworkError, httpx.RemoteProtocolError):
            outcome, answer = "cut", None
        else:
            said = f"{path}: {response.status_code} {dict(response.headers)} {response.text}"
            assert response.status_code in (200, 503), said
            if response.status_code == 503:
                assert int(response.headers["retry-after"]) > 0, said
                outcome, answer = "later", None
            else:
                answer = response.json()
                outcome = "degraded" if answer.get("degraded") else "whole"
        with self._lock:
            self.outcomes[path, outcome] += 1
        return answer
