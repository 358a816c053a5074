"""Feast stores for tests of the online side: file sources offline, any online store."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.data_format import ParquetFormat
from feast.types import Array, Float32, Float64, Int64, String

from tests.feature_repo.event_tables import TIME

TYPES = {
    "ids": Array(Int64),
    "vector": Array(Float32),
    "count": Int64,
    "rate": Float32,
    "price": Float64,
    "brand": String,
}
ARROW = {
    "ids": pa.list_(pa.int64()),
    "vector": pa.list_(pa.float32()),
    "count": pa.int64(),
    "rate": pa.float32(),
    "price": pa.float64(),
    "brand": pa.string(),
}
ENTITIES = (
    Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING),
    Entity(name="behavior", join_keys=["behavior_id"], value_type=ValueType.INT64),
)
FOREVER = timedelta(days=36_500)


def redis_config(connection: str, *, cluster: bool = False) -> dict[str, Any]:
    kind = "redis_cluster" if cluster else "redis"
    return {"type": "redis", "redis_type": kind, "connection_string": connection}


def make_view(
    folder: Path,
    name: str,
    *,
    features: Sequence[str] = tuple(TYPES),
    is_string: bool = True,
    ttl: timedelta = FOREVER,
) -> FeatureView:
    key = "user_id" if is_string else "behavior_id"
    (folder / name).mkdir(parents=True, exist_ok=True)
    schema = [Field(name=key, dtype=String if is_string else Int64)]
    return FeatureView(
        name=name,
        entities=[ENTITIES[0] if is_string else ENTITIES[1]],
        ttl=ttl,
        schema=[*schema, *(Field(name=f, dtype=TYPES[f]) for f in features)],
        source=FileSource(
            name=f"{name}_source",
            path=str(folder / name / "*.parquet"),
            file_format=ParquetFormat(),
            timestamp_field="event_timestamp",
            created_timestamp_column="created_timestamp",
        ),
    )


def make_store(folder: Path, online: dict[str, Any], views: Sequence[FeatureView]) -> FeatureStore:
    config = RepoConfig(
        project="longtrail",
        provider="local",
        registry={"registry_type": "sql", "path": f"sqlite:///{folder}/registry.db"},
        offline_store={"type": "duckdb"},
        online_store=online,
        entity_key_serialization_version=3,
        repo_path=folder,
    )
    store = FeatureStore(config=config)
    entities = {
        entity.name: entity for view in views for entity in ENTITIES if entity.name in view.entities
    }
    store.apply([*entities.values(), *views])
    return store


def make_batch(
    keys: Sequence[Any], times: Sequence[datetime], columns: Mapping[str, Sequence[Any]]
) -> pa.RecordBatch:
    """Rows of a view; the key's column follows from the type of the keys."""
    is_string = isinstance(keys[0], str)
    moments = pa.array(times, TIME)
    table = {
        "user_id" if is_string else "behavior_id": pa.array(keys),
        "event_timestamp": moments,
        "created_timestamp": moments,
        **{name: pa.array(values, ARROW[name]) for name, values in columns.items()},
    }
    return pa.RecordBatch.from_pydict(table)


def write_part(folder: Path, view: str, part: str, batch: pa.RecordBatch) -> None:
    pq.write_table(pa.Table.from_batches([batch]), folder / view / f"{part}.parquet")


def random_columns(rng: np.random.Generator, num: int) -> dict[str, list[Any]]:
    """Every type with its edges: nulls, empty lists, negative and large ids, no word, NaN."""
    edges = [0, 1, -1, 127, 128, 2**53 + 1, 2**56, 2**63 - 1, -(2**63)]
    drawn = rng.integers(-(2**63), 2**63 - 1, size=num).tolist()
    return {
        "ids": [
            (None, [], edges, rng.integers(0, 2**63 - 1, size=n % 7).tolist())[n % 4]
            for n in range(num)
        ],
        "vector": [
            (None, [], rng.normal(size=n % 40).astype(np.float32).tolist())[n % 3]
            for n in range(num)
        ],
        "count": [(*edges, *drawn)[n] for n in range(num)],
        "rate": [
            (None, 0.0, -0.0, 1.5, float(np.float32(rng.normal())))[n % 5] for n in range(num)
        ],
        "price": [(None, 0.0, 1e300, rng.normal())[n % 4] for n in range(num)],
        "brand": [(None, "", "Straße 東京 🛒", "x" * 300, f"b{n}")[n % 5] for n in range(num)],
    }
