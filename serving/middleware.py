"""What happens around every request, in pure ASGI: counted and logged, guarded, made safe.

Outermost first: the request id (asgi-correlation-id), :class:`Observed`, :class:`Hosted`, CORS
where it is allowed, :class:`Guarded`, :class:`Limited`. A middleware of Starlette's
``BaseHTTPMiddleware`` would cost a task and a queue per request.
"""

import logging
import re
import time
from collections.abc import Sequence

import orjson
from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.logs import ACCESS
from serving.metrics import Metrics
from serving.rate_limit import RateLimit
from serving.security import ApiKeys, host_of, required_scope, secret_of

MAX_REQUEST_ID_LENGTH = 128
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]+")
KEY_NAME = "longtrail.key"
"""Of a request's scope: the name of the valid key that came with it."""
_STATE = frozenset({"/readyz", "/metrics"})
"""Open to everyone, but not as often as anyone likes: both cost more than a look."""
_OTHER_ROUTE = "other"
"""Pages, files and addresses that are none: their paths are not ours, and without number."""

CONTENT_POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
"""Modules and styles of the same origin, nothing inline, in nobody's frame."""
_SAFE = (
    (b"content-security-policy", CONTENT_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_NO_STORE = (b"cache-control", b"no-store")
_REVALIDATE = (b"cache-control", b"no-cache")

_access = logging.getLogger(ACCESS)
_log = logging.getLogger(__name__)


def is_request_id(value: str) -> bool:
    """Whether a caller's request id is taken over: short, and nothing that could break a log."""
    return len(value) <= MAX_REQUEST_ID_LENGTH and bool(_REQUEST_ID.fullmatch(value))


class Observed:
    """Counts, times and logs every request, and adds the headers that make answers safe.

    An exception that nothing below has caught becomes a 500 without detail; its traceback is in the
    log, under the id of the request.

    Args:
        app: What is below.
        metrics: Where requests are counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 0

        async def send_safely(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # A file of the page may be kept and asked after; what speaks of people never.
                of_api = "route" in scope
                message["headers"] = [
                    *message.get("headers", ()),
                    *_SAFE,
                    _NO_STORE if of_api or status >= 400 else _REVALIDATE,
                ]
            await send(message)

        in_flight = self._metrics.in_flight
        in_flight.inc()
        try:
            await self._app(scope, receive, send_safely)
        except Exception:
            # Nothing of it is for the caller; the operator finds it by the request's id.
            _log.exception("a request failed: this is a defect")
            if status:
                raise  # too late for another answer: the server cuts the connection
            await refuse(send_safely, 500, "internal error")
        finally:
            in_flight.dec()
            self._count(scope, status, time.perf_counter() - start)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope.get("route")
        template = getattr(route, "path_format", _OTHER_ROUTE)
        method = scope["method"] if route is not None else _OTHER_ROUTE
        self._metrics.requests.labels(template, method, str(status)).inc()
        self._metrics.request_seconds.labels(template, method).observe(seconds)
        if _access.isEnabledFor(logging.INFO):
            milliseconds = round(seconds * 1000, 2)
            key = scope.get(KEY_NAME)
            _access.info(
                "%s %s %s %.2f ms key=%s",
                *(method, template, status, milliseconds, key or "-"),
                extra={
                    "method": method,
                    "route": template,
                    "status": status,
                    "ms": milliseconds,
                    "key": key,
                },
            )


class Hosted:
    """Turns away requests for a host that is not ours: see :func:`serving.security.hosts_allowed`.

    Starlette's own answers in plain text, redirects, and is not counted.

    Args:
        app: What is below.
        hosts: As they stand in a Host header, without port and in lower case.
        metrics: Where refusals are counted.
    """

    def __init__(self, app: ASGIApp, *, hosts: Sequence[str], metrics: Metrics) -> None:
        self._app = app
        self._hosts = frozenset(hosts)
        self._refused = metrics.refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] == "http":
            header = dict(scope["headers"]).get(b"host", b"")
            if host_of(header.decode("latin-1")) not in self._hosts:
                self._refused.labels("host").inc()
                sentence = "this service is not asked under this host: --allowed-host names others"
                await refuse(send, 421, sentence)
                return
        await self._app(scope, receive, send)


class Guarded:
    """Turns away callers without a key or scope, and those who ask too often.

    Readiness and metrics need no key and are counted apart: callers who ask too often must not make
    the service look as if it were not ready.

    Args:
        app: What is below.
        keys: Who may ask; None for everyone.
        rate_limit: How often each key, or each address without one, may ask; None for no limit.
        metrics: Where refusals are counted.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys | None,
        rate_limit: RateLimit | None,
        metrics: Metrics,
    ) -> None:
        self._app = app
        self._keys = keys
        self._rate_limit = rate_limit
        self._refused = metrics.refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        path = scope["path"] if scope["type"] == "http" else ""
        wanted = required_scope(path)
        if wanted is None and path not in _STATE:
            await self._app(scope, receive, send)
            return
        key = None
        if self._keys is not None:
            secret = secret_of(dict(scope["headers"]))
            key = self._keys.find(secret) if secret else None
            if key:
                scope[KEY_NAME] = key.name
        if self._rate_limit is not None:
            # Whoever guesses keys is counted by address.
            caller = f"key {key.name}" if key else f"address {(scope.get('client') or ('',))[0]}"
            wait_s = self._rate_limit.wait_s(caller if wanted else f"state {caller}")
            if wait_s:
                self._refused.labels("rate").inc()
                retry = ((b"retry-after", str(wait_s).encode()),)
                await refuse(send, 429, f"too many requests: wait {wait_s} s", retry)
                return
        if self._keys is not None and wanted is not None:
            if key is None:
                self._refused.labels("key").inc()
                sentence = "a valid API key is needed, as `Authorization: Bearer KEY`"
                await refuse(send, 401, sentence, ((b"www-authenticate", b"Bearer"),))
                return
            if wanted not in key.scopes:
                self._refused.labels("scope").inc()
                await refuse(send, 403, f"this API key has no scope {wanted!r}")
                return
        await self._app(scope, receive, send)


class Limited:
    """Refuses bodies that are too large, whether or not they say so.

    Starlette's own limit answers in plain text, by an exception that passes through everything
    above it.

    Args:
        app: What is below.
        max_body_bytes: Of a whole body.
        metrics: Where refusals are counted.
    """

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, metrics: Metrics) -> None:
        self._app = app
        self._max_bytes = max_body_bytes
        self._refused = metrics.refused
        self._sentence = f"a body has at most {max_body_bytes:,} bytes: send less at once"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_bytes:
            self._refused.labels("body").inc()
            await refuse(send, 413, self._sentence)
            return
        total = 0

        async def receive_counted() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self._max_bytes:
                self._refused.labels("body").inc()
                raise HTTPException(413, self._sentence)
            return message

        await self._app(scope, receive_counted, send)


async def refuse(
    send: Send, status: int, detail: str, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """Answer with a sentence."""
    body = orjson.dumps({"detail": detail})
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                *headers,
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})
