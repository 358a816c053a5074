"""The server process: one listening socket, one ranker, a stop that drops no request."""

import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.config import LOGGING_CONFIG

from feature_repo.errors import LongtrailError
from serving.app import create_app
from serving.ranker import Ranker

STOP_TIMEOUT_S = 10
"""Seconds that running requests have to end when the server is asked to stop."""

_log = logging.getLogger(__name__)


class _Announcing(uvicorn.Server):
    """Tells when it can be reached, not before."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()


def run_server(
    open_ranker: Callable[[], Ranker],
    *,
    host: str,
    port: int,
    announce: Callable[[str, Ranker], None],
) -> None:
    """Serve until SIGTERM or SIGINT, then let the running requests end.

    Args:
        open_ranker: Makes the ranker, after the port is known to be free.
        host: Name or address to listen on.
        port: Port to listen on; 0 for any free one.
        announce: Called with the address and the ranker once requests are answered.

    Raises:
        LongtrailError: If the port cannot be had, or whatever opening the ranker raises.
    """
    with _listen(host, port) as listener:
        ranker = open_ranker()
        ranker.warm_up()
        config = uvicorn.Config(
            create_app(ranker),
            log_config=_log_config(),
            timeout_graceful_shutdown=STOP_TIMEOUT_S,
        )
        server = _Announcing(config, lambda: announce(_url(listener), ranker))
        # uvicorn ends the running requests, then raises the signal again; SIGTERM is given
        # SIGINT's way out, so that a stop that was asked for is a normal return.
        previous = signal.signal(signal.SIGTERM, _interrupt)
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            _log.info("stopped")
        finally:
            signal.signal(signal.SIGTERM, previous)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``; a name other than localhost is not trusted."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        # create_server adds the address to the error's own text, where it is already named.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise LongtrailError(
            f"cannot listen on {host} port {port} ({reason}): choose another with --host and --port"
        ) from error


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _log_config() -> dict[str, Any]:
    """Return uvicorn's own, but log requests on stderr: stdout is data."""
    handlers = {
        name: {**handler, "stream": "ext://sys.stderr"}
        for name, handler in LOGGING_CONFIG["handlers"].items()
    }
    return {**LOGGING_CONFIG, "handlers": handlers}
