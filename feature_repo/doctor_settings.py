"""Checks of what is configured and registered; see :mod:`feature_repo.doctor`."""

import shutil
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

from feast.diff.property_diff import TransitionType
from feast.diff.registry_diff import FeastObjectType
from feast.feature_view import DUMMY_ENTITY_NAME, FeatureViewState
from feast.infra.online_stores.redis import RedisOnlineStore
from feast.types import Int64, String

from feature_repo.artifact import current_run, load_run_manifest
from feature_repo.definitions import define
from feature_repo.live_store import LiveStore
from feature_repo.manifest import EncoderManifest, load_encoder
from feature_repo.materialize import feast_in_log
from feature_repo.redis_lookup import RedisLine
from feature_repo.version_names import encoder_view

_MAX_BATCH_ROWS = 100_000
"""Larger batches of wide rows take gigabytes."""
_UNENCRYPTED = ("disable", "allow", "prefer")
"""Values of ``sslmode`` with which a connection may be in clear text."""
_REDIS_TIMEOUT_S = 2.0
_NEARLY_FULL = 0.9


def settings(live: LiveStore) -> Iterator[str]:
    """Settings of the yaml without which Feast refuses reads, takes gigabytes or changes keys."""
    config = live.store.config
    registry, materialization = config.registry, config.materialization_config
    if registry.registry_type != "sql":
        yield (
            f"registry.registry_type is {registry.registry_type}, expected sql: the file registry "
            "has no lock"
        )
    if not getattr(registry, "serve_features_while_materializing", False):
        yield (
            "registry.serve_features_while_materializing is false, expected true: a view refuses "
            "reads while it is copied"
        )
    if not materialization.pull_latest_features:
        yield (
            "materialization.pull_latest_features is false, expected true: `feast materialize` "
            "reads every row into memory"
        )
    batch_rows = materialization.online_write_batch_size
    if batch_rows is None or batch_rows > _MAX_BATCH_ROWS:
        yield (
            f"materialization.online_write_batch_size is {batch_rows}, expected 1 to "
            f"{_MAX_BATCH_ROWS}: `feast materialize` writes everything at once"
        )
    if config.entity_key_serialization_version != 3:
        yield (
            f"entity_key_serialization_version is {config.entity_key_serialization_version}, "
            "expected 3: rows written so far would not be found"
        )


def registry(live: LiveStore) -> Iterator[str]:
    """What `feast plan` would change."""
    definitions = define(live.home, live.store.config.offline_store.type)
    with feast_in_log():
        of_registry, of_stores, _ = live.store.plan(definitions.contents(live.store.project))
    for found in of_registry.feast_object_diffs:
        # Changes of a source show in its view, too; Feast's own plan leaves them out.
        if found.feast_object_type != FeastObjectType.DATA_SOURCE and _changes(found):
            yield _planned(found, found.feast_object_type.value)
    for found in of_stores.infra_object_diffs:
        if _changes(found):
            yield _planned(found, found.infra_object_type)


def _changes(found: Any) -> bool:
    # Feast has an entity of its own, which its plan leaves out too.
    return bool(
        found.transition_type != TransitionType.UNCHANGED and found.name != DUMMY_ENTITY_NAME
    )


def _planned(found: Any, kind: str) -> str:
    return f"apply would {found.transition_type.name.lower()} the {kind} {found.name}"


def materializing(live: LiveStore) -> Iterator[str]:
    """Views that a killed `feast materialize` left behind."""
    for view in live.views:
        if view.state == FeatureViewState.MATERIALIZING:
            yield f"{view.name} is in the state MATERIALIZING"


def join_keys(live: LiveStore) -> Iterator[str]:
    """Views with several keys, or of a type that no store compares well."""
    for view in live.views:
        columns = view.entity_columns
        if len(columns) != 1:
            names = ", ".join(column.name for column in columns) or "none"
            yield f"{view.name} has {len(columns)} join keys ({names})"
        elif columns[0].dtype not in (String, Int64):
            yield f"the join key of {view.name} is {columns[0].dtype}"


def created_column(live: LiveStore) -> Iterator[str]:
    """Sources that do not say which of two rows of equal time counts."""
    for view in live.views:
        if not view.batch_source.created_timestamp_column:
            yield f"the source of {view.name} names no created_timestamp_column"


def encryption(live: LiveStore) -> Iterator[str]:
    """Connections to other machines that may be in clear text."""
    config = live.store.config
    if config.offline_store.type == "postgres":
        host, mode = config.offline_store.host, config.offline_store.sslmode or "require"
        if mode in _UNENCRYPTED and not _is_loopback(host):
            yield f"PostgreSQL at {host} is reached with sslmode={mode}"
    if config.online_store.type == "redis":
        nodes, options = RedisOnlineStore._parse_connection_string(
            config.online_store.connection_string
        )
        hosts = [node["host"] for node in nodes if not _is_loopback(node["host"])]
        if hosts and not options.get("ssl"):
            yield f"Redis at {', '.join(hosts)} is reached without TLS"


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.startswith("/"):  # a socket of this machine
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def redis_memory(live: LiveStore) -> Iterator[str]:
    """A limit with which Redis throws features away, or refuses the next ones."""
    if live.store.config.online_store.type != "redis":
        return
    line = RedisLine(live.store, timeout_s=_REDIS_TIMEOUT_S)
    for node, memory in line.info().items():
        limit, policy = memory["maxmemory"], memory["maxmemory_policy"]
        if limit and policy != "noeviction":
            yield f"Redis at {node} evicts keys ({policy}) at {limit:,} bytes"
        if limit and memory["used_memory"] > _NEARLY_FULL * limit:
            yield f"Redis at {node} uses {memory['used_memory']:,} of {limit:,} bytes"


def disk(live: LiveStore) -> Iterator[str]:
    """Too little room: new files are complete before they replace the old ones."""
    files = live.home.features.rglob("*.parquet")
    wanted = max(live.min_free_bytes, sum(file.stat().st_size for file in files))
    free = shutil.disk_usage(live.home.root).free
    if free < wanted:
        yield f"{free:,} bytes are free at {live.home.root}, expected {wanted:,}"


def versions(live: LiveStore) -> Iterator[str]:
    """Vectors of another encoder or run than their view's, or of none that is applied."""
    for view in live.held:
        for column in ("encoder_fingerprint", "model_version"):
            if (version := view.tags.get(column)) is None:
                continue
            question = f"SELECT min({column}), max({column}) FROM {{rows}}"  # noqa: S608
            found = live.offline.ask(view.name, question)
            if strangers := sorted({value for value in found if value != version}):
                yield f"{view.name}, applied as {version}, holds vectors of {', '.join(strangers)}"
    for path in sorted(live.home.embeddings.glob(f"*/{live.home.encoder.name}")):
        encoder = EncoderManifest.load(path, made_by="longtrail encode").fingerprint
        if encoder != path.parent.name:
            yield f"the table in {path.parent} is of the encoder {encoder}"
    wanted = {}
    if live.home.encoder.exists():
        wanted["the current encoder"] = load_encoder(live.home).fingerprint
    if live.home.current_run.exists():
        run = current_run(live.home)
        wanted[f"the run {run}"] = load_run_manifest(live.home, run).encoder_fingerprint
    held = {view.name for view in live.held}
    for what, encoder in wanted.items():
        if encoder_view(encoder) not in held:
            yield f"{what} needs vectors of {encoder}, of which no applied view has any"
