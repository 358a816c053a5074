"""Values of removed features leave Redis, where Feast would keep them until their key is deleted.

Feast's hash of an entity holds the features of all its views under 4-byte hashes of their names, so
a field of a feature that exists no more looks like any other. What the registry declares says which
fields are someone's; every other one of Feast's kind is a rest.
"""

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

from feast import FeatureStore
from feast.infra.online_stores.helpers import compute_versioned_name

from feature_repo.feast_bytes import feature_field, project_of, time_field
from feature_repo.redis_lookup import RedisLine

logger = logging.getLogger(__name__)

_BATCH_KEYS = 2000
"""Keys per round trip; names of 20 fields each are 0.4 MB."""
_FIELD_BYTES = 4
"""Length of a feature's field, a murmur3 hash."""


class RedisPruning:
    """One walk through the hashes of a project.

    Args:
        store: Feast's store: its project, and the registry that declares the features.
        line: To Redis.
    """

    def __init__(self, store: FeatureStore, line: RedisLine) -> None:
        self._store = store
        self._line = line
        self._versions = store.config.registry.enable_online_feature_view_versioning
        self._declared: set[bytes] = set()

    def run(self) -> int:
        """Delete the fields that no applied view declares; how many.

        Only hashes of entities of one join key, and only fields as Feast names them, are touched.

        Raises:
            StoreError: If Redis cannot be reached.
        """
        if self._versions:  # requests may name a view's older definitions, too
            logger.info("Feast keeps versions of views: no values of removed features are deleted")
            return 0
        return sum(self._prune(keys) for keys in self._batches())

    def _declare(self) -> set[bytes]:
        """The fields of all applied views, as the registry knows them now."""
        fields = set()
        for view in self._store.registry.list_all_feature_views(self._store.project):
            name = compute_versioned_name(view, self._versions)
            fields.add(time_field(name))
            fields |= {feature_field(name, feature.name) for feature in view.features}
        return fields

    def _batches(self) -> Iterator[list[bytes]]:
        project = self._store.project.encode()
        found = self._line.scan(b"", project)
        keys = (key for key in found if project_of(key) == project)
        while batch := list(islice(keys, _BATCH_KEYS)):
            yield batch

    def _prune(self, keys: list[bytes]) -> int:
        fields = [set(filter(_is_feasts, names)) for names in self._ask("HKEYS", keys)]
        if set().union(*fields) - self._declared:
            # Asked after the fields were read: a view that was applied meanwhile loses nothing.
            self._declared = self._declare()
        rests = [(key, names - self._declared) for key, names in zip(keys, fields, strict=True)]
        doomed = [(key, *names) for key, names in rests if names]
        return sum(self._ask("HDEL", doomed))

    def _ask(self, command: str, calls: list[Any]) -> list[Any]:
        """The answers to one command for each key, in one round trip."""
        if not calls:
            return []
        with self._line.errors(), self._line.client.pipeline(transaction=False) as pipe:
            for call in calls:
                words = call if isinstance(call, tuple) else (call,)
                pipe.execute_command(command, *words)
            answers: list[Any] = pipe.execute()
        return answers


def _is_feasts(field: bytes) -> bool:
    return len(field) == _FIELD_BYTES or field.startswith(b"_ts:")
