"""The server: one listening socket, one application per process, a stop that drops no request."""

import asyncio
import gc
import logging
import mmap
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

import uvicorn
from fastapi import FastAPI

from feature_repo.errors import LongtrailError
from serving.deployment import settle_memory
from serving.workers import STOP_TIMEOUT_S, Workers

_BACKLOG = 2048
"""Connections that wait while the workers are busy; uvicorn's own number."""

_KEEP_ALIVE_S = 75
"""Seconds; longer than proxies keep idle connections (60 is usual), so that none of them sends a
request into a connection that is being closed here."""
_TURN_S = 0.001
"""Seconds that a worker leaves a connection to others, for each that it holds more."""
_MAX_TURNS = 5
_RETRY_S = 0.1
_LAST_WORDS_S = 0.1

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedApp:
    """An application that is ready to answer.

    Args:
        app: It.
        run: Name of the run that it serves, or will as soon as it can be loaded.
        refresh: Looks for another run and other keys now; called before it answers, and on SIGHUP.
        close: Ends its threads and writes what waits.
    """

    app: FastAPI
    run: str
    refresh: Callable[[], None]
    close: Callable[[], None]


class ConnectionCounts:
    """How many connections each of several workers holds; they all see it.

    Args:
        num_workers: At least 1.
    """

    def __init__(self, num_workers: int) -> None:
        # Anonymous memory is shared with processes that are forked after.
        self._counts = memoryview(mmap.mmap(-1, 8 * num_workers)).cast("q")

    def excess(self, place: int, number: int) -> int:
        """Tell that the worker holds so many; how many more than the one with the fewest."""
        self._counts[place] = number
        return number - min(self._counts)


class _Server(uvicorn.Server):
    """Takes connections in turn with other workers, and tells when it can be reached.

    Left alone, whichever process wakes first takes all that wait, and a client that keeps its
    connections then loads one worker while the others idle. Here the one with the fewest goes
    first; the others wait a moment, and take what it has not taken by then.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        announce: Callable[[], None],
        excess: Callable[[int], int],
    ) -> None:
        super().__init__(config)
        self._announce = announce
        self._excess = excess
        self._accepting: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])  # all but listening
        for listener in sockets or ():
            listener.setblocking(False)
            self._accepting.append(asyncio.create_task(self._accept(listener)))
        self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        for listener in sockets or ():
            # Who waits by now would be reset when the socket is closed.
            while await self._take(listener):
                pass
        # Requests that are on their way are read before their connections count as idle.
        await asyncio.sleep(_LAST_WORDS_S)
        await super().shutdown(sockets)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            await _readable(listener)
            excess = self._excess(len(self.server_state.connections))
            if excess > 0:
                await asyncio.sleep(_TURN_S * min(excess, _MAX_TURNS))
            await self._take(listener)

    async def _take(self, listener: socket.socket) -> bool:
        """Serve the connection that has waited longest; False where none waits."""
        try:
            connection, _ = listener.accept()
        except BlockingIOError:  # another worker has taken it
            return False
        except OSError as error:  # no file descriptor is free, or the caller has gone
            _log.error("cannot take a connection: %s", error)
            await asyncio.sleep(_RETRY_S)
            return False
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection)
        except OSError:  # the caller has gone meanwhile
            connection.close()
        return True

    def _protocol(self) -> asyncio.Protocol:
        """As uvicorn makes one for each connection."""
        protocol: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol


async def _readable(listener: socket.socket) -> None:
    """Until a connection waits."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(listener, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(listener)


def serve(
    listener: socket.socket,
    open_app: Callable[[], OpenedApp],
    *,
    announce: Callable[[str], None],
    trusted_proxies: Sequence[str] = (),
    excess: Callable[[int], int] = lambda _: 0,
) -> None:
    """Serve on a socket until SIGTERM or SIGINT, then let the running requests end.

    Args:
        listener: Bound and listening.
        open_app: Opens the application.
        announce: Called with the name of the run once requests are answered; with a 503 where it
            could not be loaded yet.
        trusted_proxies: Addresses whose ``X-Forwarded-For`` names the caller.
        excess: From the connections that are held here to how many more these are than another
            worker's.

    Raises:
        LongtrailError: Whatever opening the application raises.
    """
    opened = open_app()
    settle_memory()
    config = uvicorn.Config(
        opened.app,
        # Lines and requests are logged by serving.logs and serving.middleware.
        log_config=None,
        access_log=False,
        ws="none",
        server_header=False,
        proxy_headers=bool(trusted_proxies),
        forwarded_allow_ips=list(trusted_proxies),
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=STOP_TIMEOUT_S,
    )
    server = _Server(config, lambda: announce(opened.run), excess)
    # uvicorn ends the running requests, then raises the signal again; SIGTERM is given SIGINT's
    # way out, so that a stop that was asked for is a normal return.
    previous = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, _interrupt),
        signal.SIGHUP: signal.signal(signal.SIGHUP, lambda *_: opened.refresh()),
    }
    try:
        # What changed while it was opened, or since its parent was: no signal tells of it again.
        opened.refresh()
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        _log.info("stopped")
    finally:
        # What is written now is not cut off by someone who asks twice.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        opened.close()
        gc.unfreeze()  # or libraries report at exit what they take for leaks
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_server(
    open_app: Callable[[bool], OpenedApp],
    *,
    host: str,
    port: int,
    announce: Callable[[str, str], None],
    workers: int = 1,
    trusted_proxies: Sequence[str] = (),
    on_worker_gone: Callable[[int], None] = lambda _: None,
    on_hangup: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT, in this process or in several workers.

    Args:
        open_app: Opens the application, after the port is known to be free; told whether it takes
            the place of one that has answered, so that callers wait for it.
        host: Name or address to listen on.
        port: Port to listen on; 0 for any free one.
        announce: Called with the address and the name of the run once requests are answered.
        workers: Processes that answer; 1 for this one alone.
        trusted_proxies: Addresses whose ``X-Forwarded-For`` names the caller.
        on_worker_gone: Called with the id of every worker process that has ended.
        on_hangup: Called after a SIGHUP in the process that watches the workers, if there are any.

    Raises:
        LongtrailError: If the port cannot be had, or whatever opening the application raises.
    """
    with _listen(host, port) as listener:
        address = _url(listener)
        counts = ConnectionCounts(workers)

        def serve_here(place: int, is_replacement: bool, tell: Callable[[str], None]) -> None:
            serve(
                listener,
                lambda: open_app(is_replacement),
                announce=tell,
                trusted_proxies=trusted_proxies,
                excess=lambda number: counts.excess(place, number),
            )

        if workers == 1:
            serve_here(0, False, lambda run: announce(address, run))
        else:
            supervisor = Workers(
                serve_here,
                num_workers=workers,
                on_gone=on_worker_gone,
                on_hangup=on_hangup,
                # Or connections would wait on a socket from which nobody takes them any more.
                on_stop=listener.close,
            )
            supervisor.run(lambda run: announce(address, run))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        # create_server adds the address to the error's own text, where it is already named.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise LongtrailError(
            f"cannot listen on {host} port {port} ({reason}): choose another with --host and --port"
        ) from error


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
