"""What exists in the feature store: entities, sources, views and services.

Made from the manifest that ingest wrote; before any ingest, those of the built-in shop. Field
names, types and units come from the modules that write the files, so there is one truth for each.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from feast import Entity, FeatureService, FeatureView, Field, FileSource, Project, ValueType
from feast.data_format import ParquetFormat
from feast.data_source import DataSource
from feast.feature_store import RepoContents
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import (
    PostgreSQLSource,
)
from feast.protos.feast.core.DataSource_pb2 import DataSource as DataSourceProto
from feast.types import Array, Float32, Float64, Int64, String

from feature_repo import item_neighbors, item_stats, sequences, user_stats
from feature_repo.artifact import current_run
from feature_repo.fields import FeatureField, FieldType
from feature_repo.home import Home
from feature_repo.manifest import DataManifest, ItemColumn, Split
from feature_repo.version_names import (
    BEHAVIOR_VIEW,
    RUN_VIEWS,
    encoder_view,
    run_version,
    unversioned,
)

OWNER = "longtrail"
NEVER = timedelta(days=36_500)
"""Features of a user stay valid until the next row. Feast's 0 would mean the same offline, but its
materialize-incremental then starts at one year ago and leaves older users out."""
CTR_SERVICE = "ctr_v1"
RETRIEVAL_SERVICE = "retrieval_v1"

_TYPES = {
    "int64": Int64,
    "float32": Float32,
    "float64": Float64,
    "string": String,
    "int64_list": Array(Int64),
    "float32_list": Array(Float32),
}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SHOP_MANIFEST = DataManifest(
    dataset="generated-shop",
    scenes=("purchase", "search"),
    item_columns=(
        ItemColumn(name="price", kind="numeric"),
        ItemColumn(name="category", kind="categorical"),
    ),
    context_columns=("slot",),
    impressions="logged",
    negatives=None,
    split=Split(valid=_EPOCH, test=_EPOCH),
    replay=True,
    lowercase=True,
    availability_delay_us=1,
    label_delay_us=3_600_000_000,
    num_events=0,
    num_users=0,
    num_items=0,
    num_behaviors=0,
    num_impressions=0,
    num_rejected=0,
    first_event=_EPOCH,
    last_event=_EPOCH,
    num_buckets=1,
    source_fingerprint="",
)
"""The columns of the built-in shop, declared before anything was ingested."""
_EMBEDDING = FeatureField("embedding", "float32_list", "Unit-free vector of fixed width.")
_FINGERPRINT = FeatureField("encoder_fingerprint", "string", "Encoder of the vector.")
_MODEL_VERSION = FeatureField("model_version", "string", "Run that computed the vector.")
_DEEP_OUTPUTS = {
    "user": (
        _EMBEDDING,
        _MODEL_VERSION,
        FeatureField("history_key", "int64", "Hash of the behaviours that the vector is of."),
        FeatureField(
            "computed_time", "int64", "Moment that the behaviours' ages refer to, epoch seconds."
        ),
    ),
    "item": (
        _EMBEDDING,
        _MODEL_VERSION,
        FeatureField("text_id", "int64", "Behaviour id of the title that the vector is of."),
    ),
}
"""Entity -> the fields of its deep outputs; what they were computed from tells if they hold yet."""


@dataclass(frozen=True)
class Definitions:
    """Everything that ``feast apply`` registers."""

    entities: tuple[Entity, ...]
    views: tuple[FeatureView, ...]
    services: tuple[FeatureService, ...]

    def view(self, name: str) -> FeatureView:
        """The view of that name."""
        return next(view for view in self.views if view.name == name)

    def contents(self, project: str) -> RepoContents:
        """What Feast finds when it imports ``repo.py``."""
        return RepoContents(
            projects=[Project(name=project)],
            data_sources=[view.batch_source for view in self.views],
            entities=list(self.entities),
            feature_views=list(self.views),
            feature_services=list(self.services),
            on_demand_feature_views=[],
            stream_feature_views=[],
            label_views=[],
            permissions=[],
        )


def _same_stamps(data_source_proto: DataSourceProto) -> None:
    """Write the epoch as a source's times.

    Feast stamps a source with the time of its definition's import, and compares the stamps
    of every view that was materialised: `feast plan` would report changes for ever.
    """
    data_source_proto.meta.created_timestamp.FromDatetime(_EPOCH)
    data_source_proto.meta.last_updated_timestamp.FromDatetime(_EPOCH)


def define(home: Home, offline_type: str = "duckdb") -> Definitions:
    """Definitions for the data set in ``home``.

    Every encoder's vectors and every exported run's are views of their own
    (:mod:`feature_repo.version_names`), which :data:`RETRIEVAL_SERVICE` names for the run that is
    served. Before any ingest the views have no version.

    Args:
        home: Its manifests and files say what exists.
        offline_type: Type of the profile's offline store: the views' sources are tables for
            ``postgres``, else the home's parquet files. Everything else is the same.
    """
    manifest = SHOP_MANIFEST
    if home.manifest.exists():
        manifest = DataManifest.load(home.manifest, made_by="longtrail ingest")

    user = _entity("user_id", ValueType.STRING, "A person whose behaviours are recorded.")
    item = _entity("item_id", ValueType.STRING, "Something that can be ranked.")
    behavior = _entity(
        "behavior_id", ValueType.INT64, "A distinct behaviour text: 63-bit hash of it, normalised."
    )
    views = [
        _view(
            home, offline_type, "user_sequences", user, sequences.fields(manifest),
            f"The last {manifest.sequence_length} behaviours per scene, oldest first, one row per "
            "change; row of a time holds everything up to and including it.",
        ),
        _view(
            home, offline_type, "user_stats", user, user_stats.fields(manifest),
            "How active a user has been, over windows that end at the row's time.",
        ),
        _view(
            home, offline_type, "items", item, item_stats.fields(manifest),
            "An item's title, columns and popularity; daily snapshots at midnight UTC.",
        ),
        _view(
            home, offline_type, "item_neighbors", item, item_neighbors.fields(manifest),
            "Items that the same users and baskets hold; counted anew every "
            f"{item_neighbors.REFRESH_DAYS} days.",
        ),
    ]  # fmt: skip
    services = [
        FeatureService(
            name=CTR_SERVICE,
            features=list(views),
            description="What a ranking model reads for a user and a candidate item.",
            owner=OWNER,
            tags={"dataset": manifest.dataset},
        )
    ]
    vectors = [
        _view(
            home, offline_type, encoder_view(encoder) if encoder else BEHAVIOR_VIEW, behavior,
            (_EMBEDDING, _FINGERPRINT),
            "Each distinct behaviour text through the frozen shallow half of one language model.",
            version=encoder, tags={"encoder_fingerprint": encoder or "none"},
        )
        for encoder in _versions(home, BEHAVIOR_VIEW)
    ]  # fmt: skip
    deep_outputs = {
        (entity.name, run): _view(
            home, offline_type, f"{name}_{run_version(run)}" if run else name, entity,
            _DEEP_OUTPUTS[entity.name],
            f"Deep output of one trained model for each {entity.name}; filled by export.",
            version=run, tags={"model_version": run or "none"},
        )
        for name, entity in zip(RUN_VIEWS, (user, item), strict=True)
        for run in _versions(home, name)
    }  # fmt: skip
    served = current_run(home) if home.current_run.exists() else None
    retrieval = [view for (_, run), view in deep_outputs.items() if run == served]
    if len(retrieval) == len(RUN_VIEWS):
        services.append(
            FeatureService(
                name=RETRIEVAL_SERVICE,
                features=list(retrieval),
                description="Vectors of users and items in one space, for nearest neighbours.",
                owner=OWNER,
                tags={"dataset": manifest.dataset},
            )
        )
    views += [*vectors, *deep_outputs.values()]
    return Definitions((user, item, behavior), tuple(views), tuple(services))


def _versions(home: Home, view: str) -> list[str | None]:
    """Folders of a view that hold rows: a view without any can be neither materialised nor read.

    None, which stands for a view without version, before any ingest.
    """
    folders = {path.parent.name for path in home.view(view).glob("*/*.parquet")}
    complete = sorted(name for name in folders if not name.endswith(".part"))
    return [*complete] if complete or home.manifest.exists() else [None]


def _entity(key: str, value_type: ValueType, description: str) -> Entity:
    return Entity(
        name=key.removesuffix("_id"),
        join_keys=[key],
        value_type=value_type,
        description=description,
        owner=OWNER,
        tags={"key": key},
    )


def _view(
    home: Home,
    offline_type: str,
    name: str,
    entity: Entity,
    fields: tuple[FeatureField, ...],
    description: str,
    *,
    version: str | None = None,
    tags: dict[str, str] | None = None,
) -> FeatureView:
    key = entity.join_key
    key_type: FieldType = "int64" if entity.value_type == ValueType.INT64 else "string"
    all_fields = (FeatureField(key, key_type, entity.description), *fields)
    return FeatureView(
        name=name,
        entities=[entity],
        ttl=NEVER,
        schema=[
            Field(name=f.name, dtype=_TYPES[f.type], description=f.description) for f in all_fields
        ],
        online=True,
        source=_source(home, offline_type, name, version),
        description=description,
        owner=OWNER,
        tags=tags or {"written_by": "longtrail"},
    )


def _source(home: Home, offline_type: str, view: str, version: str | None) -> DataSource:
    """Where the rows of a view are in an offline store; the same names and times in each."""
    common: dict[str, Any] = {
        "name": f"{view}_source",
        "timestamp_field": "event_timestamp",
        "created_timestamp_column": "created_timestamp",
        "owner": OWNER,
        "tags": {"view": view},
    }
    if offline_type == "postgres":
        source = PostgreSQLSource(table=view, description=f"Table of {view}.", **common)
    else:
        folder = home.view(unversioned(view)) / (version or "")
        source = FileSource(
            path=str(folder / "*.parquet"),
            file_format=ParquetFormat(),
            description=f"Parquet files of {view}.",
            **common,
        )
    source._set_timestamps_in_proto = _same_stamps
    return source
