"""The process that puts an open-loop load on a server; see :mod:`benchmarks.load`.

It writes prepared bytes to kept-alive sockets and takes a few percent of a core at 200 requests a
second::

    python -m benchmarks.load_generator PLAN.json

reads a :class:`LoadPlan` and prints a :class:`LoadResult` as one JSON line.
"""

import asyncio
import gc
import json
import math
import sys
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
import uvloop

from benchmarks.load import QUANTILES, LoadPlan, LoadResult

_EARLY_S = 0.0005
"""The loop's timers tick in milliseconds: a request may leave this much too early, and then counts
from when it left."""
_SWEEP_S = 0.25


async def generate(plan: LoadPlan) -> LoadResult:
    """Run a plan in this event loop."""
    return await _Load(plan).run()


@dataclass
class _Request:
    number: int
    due: float
    """The intended moment, of :func:`time.monotonic`."""
    sent: float = math.nan
    waited: bool = False
    """No connection was free when it was due."""


@dataclass
class _Tally:
    """What the measured requests came to."""

    latency_s: list[float] = field(default_factory=list)
    answer_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    num_checked: int = 0


class _Connection(asyncio.Protocol):
    """One kept-alive connection with at most one request on its way."""

    def __init__(self, load: "_Load") -> None:
        self._load = load
        self._received = bytearray()
        self._size = -1  # of head and body; -1 while the head is incomplete
        self._length = 0  # of the body
        self._status = 0
        self._closing = False
        self.request: _Request | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def send(self, request: _Request, content: bytes, now: float) -> None:
        request.sent = now
        self.request = request
        self._transport.write(content)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._size < 0:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            self._read_head(bytes(self._received[:end]).lower(), end + 4)
        if self._size >= 0 and len(self._received) >= self._size:
            body, self._received = bytes(self._received[-self._length :]), bytearray()
            self._size = -1
            request, self.request = self.request, None
            if request is not None:
                self._load.answered(request, self._status, body)
            if self._closing or request is None:  # an answer that nobody asked for
                self.abort()
            else:
                self._load.free(self)

    def _read_head(self, head: bytes, start: int) -> None:
        self._status = int(head[9:12])
        self._closing = b"\r\nconnection: close" in head
        _, found, rest = head.partition(b"\r\ncontent-length:")
        if not found:
            self._fail("answer without content-length")
            return
        self._length = int(rest.split(b"\r\n", 1)[0])
        self._size = start + self._length

    def _fail(self, why: str) -> None:
        request, self.request = self.request, None
        if request is not None:
            self._load.failed(request, why)
        self.abort()

    def abort(self, why: str | None = None) -> None:
        """Close at once; the request on its way, if any, fails for the reason given."""
        if why is not None:
            self._fail(why)
        else:
            self._transport.abort()

    def connection_lost(self, _: Exception | None) -> None:
        request, self.request = self.request, None
        if request is not None:
            self._load.failed(request, "connection lost")
        self._load.closed(self)


class _Load:
    """The requests of one plan."""

    def __init__(self, plan: LoadPlan) -> None:
        self._plan = plan
        parts = urlsplit(plan.url)
        self._host, self._port = str(parts.hostname), int(parts.port or 80)
        self._contents = [_content(self._host, self._port, plan.path, b) for b in plan.bodies]
        self._loop = asyncio.get_running_loop()
        self._connections: set[_Connection] = set()
        self._idle: deque[_Connection] = deque()
        self._waiting: deque[_Request] = deque()
        self._opening: set[asyncio.Task[None]] = set()
        self._most_connections = 0
        self._tally = _Tally()
        self._next = 0
        self._num_done = 0
        self._num_total = plan.num_warm + plan.num_measured
        self._start = 0.0
        self._cpu_start = 0.0
        self._done = asyncio.Event()

    async def run(self) -> LoadResult:
        # At a low rate fewer, or a server closes them between two requests for idleness.
        wanted = min(self._plan.num_connections, max(1, math.ceil(self._plan.rate)))
        await asyncio.gather(*(self._open() for _ in range(wanted)))
        if not self._connections:
            raise ConnectionError(f"nothing answers at {self._plan.url}: is the server up?")
        gc.collect()
        gc.freeze()
        self._start = time.monotonic() + 0.05
        self._loop.call_later(0.05, self._tick)
        sweep = asyncio.create_task(self._sweep())
        await self._done.wait()
        ended, cpu_end = time.monotonic(), time.process_time()
        sweep.cancel()
        for connection in list(self._connections):
            connection.abort()
        return self._result(ended, cpu_end)

    def _due(self, number: int) -> float:
        return self._start + number / self._plan.rate

    def _tick(self) -> None:
        """Send all that is due, and come back for the next one."""
        # Not the loop's own time: uvloop reads it once per turn, in milliseconds.
        now = time.monotonic()
        while self._next < self._num_total and self._due(self._next) - now <= _EARLY_S:
            if self._next == self._plan.num_warm:
                self._cpu_start = time.process_time()
            request = _Request(self._next, self._due(self._next))
            self._next += 1
            if self._idle:
                self._send(self._idle.popleft(), request, now)
            else:
                request.waited = True
                self._waiting.append(request)
                self._grow()
        if self._next < self._num_total:
            self._loop.call_later(max(0.0, self._due(self._next) - now), self._tick)

    def _send(self, connection: _Connection, request: _Request, now: float) -> None:
        connection.send(request, self._contents[request.number % len(self._contents)], now)

    def _grow(self) -> None:
        if len(self._connections) + len(self._opening) < self._plan.max_connections:
            task = asyncio.create_task(self._open())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self) -> None:
        try:
            _, connection = await self._loop.create_connection(
                lambda: _Connection(self), self._host, self._port
            )
        except OSError:
            return  # whoever waits for it times out, and is counted then
        self._connections.add(connection)
        self._most_connections = max(self._most_connections, len(self._connections))
        self.free(connection)

    def free(self, connection: _Connection) -> None:
        """A connection can take the next request: the oldest waiting one, else it rests.

        The longest rested is taken first: connections lie on several workers of a server, and all
        shall work.
        """
        if self._waiting:
            self._send(connection, self._waiting.popleft(), time.monotonic())
        else:
            self._idle.append(connection)

    def closed(self, connection: _Connection) -> None:
        """A connection is gone."""
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if self._waiting:
            self._grow()

    def answered(self, request: _Request, status: int, body: bytes) -> None:
        """An answer is complete."""
        why = None if status == 200 else f"status {status}"
        checked = why is None and request.number % self._plan.check_every == 0
        if checked:
            why = self._problem(body)
        if why is not None:
            self.failed(request, why)
            return
        if request.number >= self._plan.num_warm:
            now = time.monotonic()
            self._tally.latency_s.append(now - min(request.due, request.sent))
            self._tally.answer_s.append(now - request.sent)
            self._tally.num_checked += checked
            if not request.waited:
                self._tally.late_s.append(request.sent - request.due)
        self._ended()

    def _problem(self, body: bytes) -> str | None:
        answer = json.loads(body)
        if len(answer["ranked"]) != self._plan.num_ranked:
            return f"{len(answer['ranked'])} ranked items"
        path = self._plan.answer_path
        if path is not None and answer["path"] != path:
            return f"path {answer['path']}"
        return None

    def failed(self, request: _Request, why: str) -> None:
        """A request was not answered as it should."""
        if request.number >= self._plan.num_warm:
            self._tally.errors[why] += 1
        self._ended()

    def _ended(self) -> None:
        self._num_done += 1
        if self._num_done == self._num_total:
            self._done.set()

    async def _sweep(self) -> None:
        """Give up on what takes too long."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            oldest = time.monotonic() - self._plan.timeout_s
            while self._waiting and self._waiting[0].due < oldest:
                self.failed(self._waiting.popleft(), "timeout")
            for connection in list(self._connections):
                if connection.request is not None and connection.request.due < oldest:
                    connection.abort("timeout")

    def _result(self, ended: float, cpu_end: float) -> LoadResult:
        tally, plan = self._tally, self._plan
        seconds = ended - self._due(plan.num_warm)
        return LoadResult(
            rate=plan.rate,
            achieved_rate=len(tally.latency_s) / seconds,
            num_requests=plan.num_measured,
            num_errors=sum(tally.errors.values()),
            errors=dict(tally.errors.most_common()),
            num_checked=tally.num_checked,
            latency_ms=_quantiles_ms(tally.latency_s),
            answer_ms=_quantiles_ms(tally.answer_s),
            late_ms=float(np.percentile(tally.late_s or [0.0], 99) * 1e3),
            num_connections=self._most_connections,
            cpu_s=cpu_end - self._cpu_start,
            seconds=seconds,
        )


def _quantiles_ms(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    return {name: float(np.percentile(seconds, q) * 1e3) for name, q in QUANTILES.items()}


def _content(host: str, port: int, path: str, body: str) -> bytes:
    content = body.encode()
    return (
        f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    ).encode() + content


def main() -> None:
    (file,) = sys.argv[1:]
    values: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
    plan = LoadPlan(**values | {"bodies": tuple(values["bodies"])})
    print(json.dumps(asdict(uvloop.run(generate(plan)))))


if __name__ == "__main__":
    main()
