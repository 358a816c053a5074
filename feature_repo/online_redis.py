"""Features into Redis as Feast lays them out, from arrow batches; plain ``feast`` reads them.

Besides Feast's hashes (:mod:`feature_repo.redis_lookup`) there are ``longtrail:<project>:N``, a
hash on every primary with a mark per view, and ``longtrail:<project>:writer``: who is copying.

A write is one script per row, all of a batch in one pipeline: the time that is stored is compared
and the row set in one step, so that no push between the two is lost.
"""

import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from feast import FeatureStore, FeatureView
from redis import RedisCluster
from redis.exceptions import LockError, NoScriptError, RedisClusterException, RedisError
from redis.lock import Lock

from feature_repo.errors import StoreError
from feature_repo.feast_bytes import KeyCodec, time_bytes, times_from_bytes, value_bytes
from feature_repo.fields import EVENT_TIMESTAMP
from feature_repo.moments import micros
from feature_repo.redis_lookup import RedisLine, ViewLayout
from feature_repo.redis_pruning import RedisPruning

WRITE_TIMEOUT_S = 5.0
"""Of a batch, at least: a server may pause for seconds to save its data."""
_LOCK_S = 30.0
"""A dead owner on another machine blocks others for this long."""
_PIPELINE_KEYS = 2000

# KEYS: hash. ARGV: newest time that may be replaced, field of the time, command, its arguments.
# A Timestamp is two varints. Numbers are doubles here: seven groups of 7 bits are exact, and tell a
# time before 1970 (ten bytes) as what is missing to 2^49.
_SCRIPT = """
local function moment(message)
  local parts, place = {0, 0}, 1
  while place <= #message do
    local field, number, unit, count, byte = math.floor(message:byte(place) / 8), 0, 1, 0, 0
    repeat
      place, count = place + 1, count + 1
      byte = message:byte(place)
      if count < 8 then number, unit = number + byte % 128 * unit, unit * 128 end
    until byte < 128
    if count == 10 then number = number - unit end
    parts[field] = number
    place = place + 1
  end
  return parts[1], parts[2]
end
local stored = redis.call('HGET', KEYS[1], ARGV[2])
if stored and stored ~= ARGV[1] then
  local seconds, nanos = moment(stored)
  local last_seconds, last_nanos = moment(ARGV[1])
  if seconds > last_seconds or (seconds == last_seconds and nanos > last_nanos) then return 0 end
end
redis.call(ARGV[3], KEYS[1], unpack(ARGV, 4))
return 1
"""


class RedisWriter:
    """The contract of :class:`feature_repo.online.OnlineWriter` over Redis.

    Args:
        store: Feast's store.

    Raises:
        StoreError: If Redis cannot be reached.
    """

    def __init__(self, store: FeatureStore) -> None:
        self._store = store
        self._line = RedisLine(store, timeout_s=WRITE_TIMEOUT_S)
        self._expiry_s = store.config.online_store.key_ttl_seconds
        self._lost = threading.Event()
        with self._line.errors():
            self._script = self._client.script_load(_SCRIPT)

    @property
    def _client(self) -> Any:
        return self._line.client

    @contextmanager
    def hold(self, owner: str) -> Iterator[None]:
        """Hold a lock in Redis that ends by itself half a minute after its owner died."""
        name = f"longtrail:{self._store.project}:writer"
        lock = Lock(self._client, name, timeout=_LOCK_S, thread_local=False)
        with self._line.errors():
            held = (self._client.get(name) or b"").decode()
            if held.startswith(f"{owner} "):  # whoever asks holds the home: that one is dead
                self._client.delete(name)
            if not lock.acquire(blocking=False, token=f"{owner} {uuid.uuid4().hex}"):
                holder = held.rpartition(" ")[0]
                raise StoreError(
                    f"{holder} is copying to this Redis; wait for it to end, then run this again"
                )
        stop = threading.Event()
        beat = threading.Thread(target=self._keep, args=(lock, stop), daemon=True)
        beat.start()
        try:
            yield
        finally:
            stop.set()
            beat.join()
            # A server that died took the lock along, or keeps it until it expires.
            with suppress(LockError, RedisError, RedisClusterException):
                lock.release()

    def _keep(self, lock: Lock, stop: threading.Event) -> None:
        while not stop.wait(_LOCK_S / 3):
            try:
                lock.reacquire()
            except LockError:  # it expired while this process was stopped
                self._lost.set()
                return
            except (RedisError, RedisClusterException):
                continue  # the copy itself meets the same error, and tells

    def write(
        self, view: FeatureView, batch: pa.RecordBatch, *, until: datetime | None = None
    ) -> int:
        """Encode a batch column by column and write it in one pipeline."""
        layout = ViewLayout.of(self._store, view)
        keys = layout.codec.encode(batch.column(_key(view)).to_pylist())
        moments = batch.column(EVENT_TIMESTAMP).cast(pa.timestamp("us", tz="UTC"))
        times = np.asarray(moments.cast(pa.int64()))
        limits = times if until is None else np.maximum(times, micros(until))
        columns: list[Sequence[bytes]] = [[layout.time] * len(keys), time_bytes(times)]
        for name, (field, kind) in layout.features.items():
            columns += [[field] * len(keys), value_bytes(batch.column(name), kind)]
        rows = zip(*columns, strict=True)
        return self._run(layout, keys, time_bytes(limits), b"HSET", rows)

    def delete(self, view: FeatureView, keys: pa.Array, *, until: datetime) -> int:
        """Delete the view's fields; a hash without fields is gone."""
        layout = ViewLayout.of(self._store, view)
        fields = (layout.time, *(field for field, _ in layout.features.values()))
        encoded = layout.codec.encode(keys.to_pylist())
        (limit,) = time_bytes(np.array([micros(until)]))
        return sum(
            self._run(layout, part, [limit] * len(part), b"HDEL", [fields] * len(part))
            for part in _batches(encoded, _PIPELINE_KEYS)
        )

    def _run(
        self,
        layout: ViewLayout,
        keys: Sequence[bytes],
        limits: Sequence[bytes],
        command: bytes,
        arguments: Iterable[Sequence[bytes]],
    ) -> int:
        """Run the script for every key; how many rows it changed."""
        if self._lost.is_set():
            raise StoreError(
                "this copy was stopped for so long that another may have taken its place: run "
                "`longtrail materialize` again"
            )
        calls = [
            ("EVALSHA", self._script, 1, key, limit, layout.time, command, *row)
            for key, limit, row in zip(keys, limits, arguments, strict=True)
        ]
        with self._line.errors():
            try:
                return self._execute(calls)
            except NoScriptError:  # the server was restarted: rows may be written twice
                self._script = self._client.script_load(_SCRIPT)
                return self._execute(calls)

    def _execute(self, calls: Sequence[tuple[Any, ...]]) -> int:
        with self._client.pipeline(transaction=False) as pipe:
            for call in calls:
                pipe.execute_command(*call)
            if self._expiry_s:
                for call in calls:
                    pipe.expire(call[3], self._expiry_s)
            return sum(pipe.execute()[: len(calls)])

    def keys(self, view: FeatureView, batch_keys: int) -> Iterator[pa.Array]:
        """Walk through all keys of the entity with SCAN; keep those with a time of the view."""
        layout = ViewLayout.of(self._store, view)
        for found in _batches(self._scan(layout.codec), batch_keys):
            yield self._with_rows(layout, found)

    def _scan(self, codec: KeyCodec) -> Iterator[bytes]:
        found = self._line.scan(codec.prefix, codec.suffix)
        return (key for key in found if codec.owns(key))

    def _with_rows(self, layout: ViewLayout, keys: Sequence[bytes]) -> pa.Array:
        rows = [
            row
            for part in _batches(keys, _PIPELINE_KEYS)
            for row in self._line.hashes(part, [layout.time])
        ]
        return layout.codec.decode([k for k, (time,) in zip(keys, rows, strict=True) if time])

    def turn_back(self, view: FeatureView, *, to: datetime, now: Callable[[], datetime]) -> int:
        """Change the event times that are still those that were read."""
        layout = ViewLayout.of(self._store, view)
        (moment,) = time_bytes(np.array([micros(to)]))
        num_rows = 0
        for keys in _batches(self._scan(layout.codec), _PIPELINE_KEYS):
            times = [time for (time,) in self._line.hashes(keys, [layout.time])]
            latest = micros(now())
            rows = zip(keys, times, times_from_bytes(times).tolist(), strict=True)
            ahead = [(key, time) for key, time, micros in rows if time and micros > latest]
            num_rows += self._run(
                layout,
                [key for key, _ in ahead],
                [time for _, time in ahead],
                b"HSET",
                [(layout.time, moment)] * len(ahead),
            )
        return num_rows

    def clear(self, view: FeatureView) -> None:
        """Delete the view's fields of every key, one batch after the other."""
        for keys in self.keys(view, _PIPELINE_KEYS):
            self.delete(view, keys, until=datetime.max.replace(tzinfo=UTC))

    def prune(self) -> int:
        """Walk through all keys of the project; see :class:`RedisPruning`."""
        return RedisPruning(self._store, self._line).run()

    def count(self, view: FeatureView) -> int:
        """Walk through all keys of the entity; O(keys)."""
        return sum(len(keys) for keys in self.keys(view, _PIPELINE_KEYS))

    def evicted(self) -> dict[str, int]:
        """``evicted_keys`` of every primary, which begins anew with each start of a server."""
        return {said["run_id"]: said["evicted_keys"] for said in self._line.info().values()}

    def mark(self, view: str, text: str) -> None:
        """Write the text on every primary, behind the rows that were written before."""
        with self._line.errors():
            for key in self._mark_keys():
                self._client.hset(key, view, text)

    def marks(self, view: str) -> set[str]:
        """What every primary holds."""
        with self._line.errors():
            return {(self._client.hget(key, view) or b"").decode() for key in self._mark_keys()}

    def _mark_keys(self) -> list[str]:
        """A key that lies on each primary with slots."""
        prefix = f"longtrail:{self._store.project}:"
        client: Any = self._client
        if not isinstance(client, RedisCluster):
            return [f"{prefix}0"]
        keys: dict[str, str] = {}
        num_primaries = len(client.get_primaries())  # type: ignore[no-untyped-call]
        # Names fall on primaries as by dice; one without slots never comes.
        for number in range(100 * num_primaries):
            key = f"{prefix}{number}"
            node = client.get_node_from_key(key)  # type: ignore[no-untyped-call]
            keys.setdefault(node.name, key)
            if len(keys) == num_primaries:
                break
        return list(keys.values())


def _key(view: FeatureView) -> str:
    name: str = view.entity_columns[0].name
    return name


def _batches(keys: Iterable[bytes], size: int) -> Iterator[list[bytes]]:
    """Up to ``size`` keys at a time."""
    left = iter(keys)
    while batch := list(islice(left, size)):
        yield batch
