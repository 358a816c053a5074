"""Redis as Feast lays it out, read in one round trip.

One hash per entity, ``<entity key><project>``; a field per feature of every view of that entity and
``_ts:<view>`` with the event time. See :mod:`feature_repo.feast_bytes` for what the bytes mean.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from feast import FeatureStore, FeatureView
from feast.infra.online_stores.helpers import compute_versioned_name
from feast.infra.online_stores.redis import RedisOnlineStore
from feast.types import String
from numpy.typing import NDArray
from redis import RedisCluster
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    OutOfMemoryError,
    RedisClusterException,
    RedisError,
)
from redis.retry import Retry

from feature_repo.errors import StoreAwayError, StoreError
from feature_repo.feast_bytes import (
    VALUE_FIELDS,
    KeyCodec,
    feature_field,
    time_field,
    times_from_bytes,
)

READ_TIMEOUT_S = 0.2
"""Of a lookup whose address names none: a ranking cannot wait longer for one that hangs."""
_TIMEOUTS = ("socket_timeout", "socket_connect_timeout")
_REFUSAL = "username-password"
"""In what Redis says to a wrong login, which the client of a cluster wraps into another error."""
_SCAN_KEYS = 2000
"""Names that a server looks at per step of a walk."""


@dataclass(frozen=True)
class ViewLayout:
    """How the rows of a view lie in Redis."""

    codec: KeyCodec
    time: bytes
    """Field of the event time."""
    features: dict[str, tuple[bytes, str]]
    """Feature -> its field in the hash, and the field of ``Value`` that its values set."""

    @classmethod
    def of(cls, store: FeatureStore, view: FeatureView) -> "ViewLayout":
        """The layout of an applied view."""
        (key,) = view.entity_columns
        versions = store.config.registry.enable_online_feature_view_versioning
        name = compute_versioned_name(view, versions)
        return cls(
            codec=KeyCodec(key.name, store.project, is_string=key.dtype == String),
            time=time_field(name),
            features={
                f.name: (feature_field(name, f.name), VALUE_FIELDS[f.dtype]) for f in view.features
            },
        )


class RedisLine:
    """A client of the profile's Redis or Redis Cluster that fails fast instead of trying again.

    redis-py's own retries hold a lookup for 5 to 9 s when the server is away.

    Args:
        store: Feast's store.
        timeout_s: Of connecting and of every answer, at least; the address may name a longer one.
    """

    def __init__(self, store: FeatureStore, *, timeout_s: float = 0.0) -> None:
        self._config = store.config.online_store
        nodes, named = RedisOnlineStore._parse_connection_string(self._config.connection_string)
        self._timeouts_s = {
            name: max(timeout_s, named.get(name, READ_TIMEOUT_S)) for name in _TIMEOUTS
        }
        self.place = ", ".join(f"{node['host']}:{node['port']}" for node in nodes)
        """Hosts and ports, for people."""

    @cached_property
    def client(self) -> Any:
        """The client; connects only where it is a cluster's, which asks for the nodes."""
        words = [f"{name}={seconds}" for name, seconds in self._timeouts_s.items()]
        address = ",".join([self._config.connection_string, *words])  # of two words the last counts
        config = self._config.model_copy(update={"connection_string": address})
        client = RedisOnlineStore()._get_client(config)
        client.set_retry(Retry(NoBackoff(), 0))
        return client

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn the library's errors into one sentence that holds no secret.

        Raises:
            StoreError: In place of them; a :class:`StoreAwayError` where it may answer later.
        """
        try:
            yield
        except (RedisError, RedisClusterException) as error:
            if isinstance(error, OutOfMemoryError) or "OOM " in str(error):  # of a script
                raise StoreError(
                    f"Redis at {self.place} is full (maxmemory): nothing more was copied; give it "
                    "more memory or remove views, then run this again"
                ) from error
            if isinstance(error, AuthenticationError) or _REFUSAL in str(error):  # of a cluster
                raise StoreError(
                    f"Redis at {self.place} refuses the login ({error}): check the user and the "
                    "password in REDIS_URL"
                ) from error
            if "MISCONF" in str(error):
                raise StoreError(
                    f"Redis at {self.place} cannot write to its disk and takes nothing new "
                    f"({error}): nothing more was copied; free space there, then run this again"
                ) from error
            raise StoreAwayError(
                f"Redis at {self.place} does not answer as it should ({type(error).__name__}: "
                f"{error}); check that it runs, then run this again"
            ) from error

    def info(self) -> dict[str, dict[str, Any]]:
        """What every primary says of itself: its address, for people -> its ``INFO``."""
        with self.errors():
            client: Any = self.client
            if not isinstance(client, RedisCluster):
                return {self.place: client.info()}
            nodes: Any = client.get_primaries()  # type: ignore[no-untyped-call]
            said: dict[str, Any] = {node.name: client.info(target_nodes=node) for node in nodes}
            return said

    def scan(self, prefix: bytes, suffix: bytes) -> Iterator[bytes]:
        """Hashes whose names begin and end so, of every primary; one may come twice."""
        pattern = _literal(prefix) + b"*" + _literal(suffix)
        with self.errors():
            yield from self.client.scan_iter(pattern, count=_SCAN_KEYS, _type="HASH")

    def hashes(
        self, keys: Sequence[bytes], fields: Sequence[bytes]
    ) -> list[Sequence[bytes | None]]:
        """The values of some fields of each key, None where missing, in one round trip."""
        with self.errors(), self.client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.execute_command("HMGET", key, *fields)
            rows: list[Sequence[bytes | None]] = pipe.execute()
        return rows


def _literal(name: bytes) -> bytes:
    """A pattern of SCAN that matches a name alone."""
    return b"".join(b"\\" + bytes([byte]) if byte in b"*?[]\\^" else bytes([byte]) for byte in name)


class RedisLookup:
    """Looks rows of views up, all views of an entity in one round trip of one HMGET per key.

    Args:
        store: Feast's store.
        views: Views of one entity, and which of their features.
    """

    def __init__(self, store: FeatureStore, views: Sequence[tuple[FeatureView, list[str]]]) -> None:
        self._line = RedisLine(store)
        self._views = [(ViewLayout.of(store, view), features) for view, features in views]
        self._fields = [
            field
            for layout, features in self._views
            for field in (layout.time, *(layout.features[name][0] for name in features))
        ]

    def read(
        self, keys: Sequence[str] | Sequence[int]
    ) -> list[tuple[NDArray[np.int64], list[Sequence[bytes | None]]]]:
        """The rows of R keys.

        Returns:
            For each view the event times, int64 [R] in epoch microseconds, 0 where there is no row,
            and for each feature R ``Value`` messages.

        Raises:
            StoreError: If Redis does not answer within the address's ``socket_timeout``.
        """
        rows = self._line.hashes(self._views[0][0].codec.encode(keys), self._fields)
        columns = iter(zip(*rows, strict=True))
        return [
            (times_from_bytes(next(columns)), [next(columns) for _ in features])
            for _, features in self._views
        ]
