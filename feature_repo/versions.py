"""Which encoders and runs the home holds, and which of them is served.

Versions lie beside each other (:mod:`feature_repo.version_names`), so serving another one is a
change of one name. Whoever has opened a run goes on reading its version until
:mod:`feature_repo.garbage` removes it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from feature_repo.artifact import (
    ArtifactManifest,
    current_run,
    finished_runs,
    load_current_run,
    load_run_manifest,
    previous_run,
    set_current_run,
    set_previous_run,
)
from feature_repo.definitions import define
from feature_repo.errors import ArtifactError
from feature_repo.home import Home
from feature_repo.manifest import EncoderManifest, load_encoder
from feature_repo.materialize import apply, copied_views
from feature_repo.reader import FeatureReader
from feature_repo.version_names import (
    ENCODER_FILE,
    ENTITIES,
    RUN_VIEWS,
    encoder_view,
    run_view,
    unversioned,
)


@dataclass(frozen=True)
class EncoderVersion:
    """An encoder whose vectors lie in the home.

    Args:
        fingerprint: Of the encoder.
        model: Hub name or folder.
        split_layer: Layers of its shallow half.
        width: D, length of a vector.
        created: When it first encoded, UTC.
        size_bytes: Of its vectors, the memory-mapped form included.
        runs: Finished runs that were trained on its vectors.
        current: New texts are encoded with it, and new runs trained on it.
        served: The run that is served reads it.
    """

    fingerprint: str
    model: str
    split_layer: int
    width: int
    created: datetime
    size_bytes: int
    runs: tuple[str, ...]
    current: bool
    served: bool


@dataclass(frozen=True)
class RunVersion:
    """A finished run.

    Args:
        run: Its name.
        recipe: What was trained.
        created: When it was finished, UTC.
        encoder: Fingerprint of the encoder whose vectors it reads.
        size_bytes: Of the artifact and of what was exported.
        exported: Its vectors of users and items are feature views.
        test_auc: As measured when it was trained.
        current: It is served.
        before: `longtrail rollback` serves it again.
    """

    run: str
    recipe: str
    created: datetime
    encoder: str
    size_bytes: int
    exported: bool
    test_auc: float | None
    current: bool
    before: bool


@dataclass(frozen=True)
class Versions:
    """What the home holds; the newest run is first."""

    encoders: tuple[EncoderVersion, ...]
    runs: tuple[RunVersion, ...]


@dataclass(frozen=True)
class Switch:
    """What a promotion did.

    Args:
        run: The run that is served now.
        was: The run that was served until now; None where there was none.
        encoder: Fingerprint of the encoder whose vectors it reads.
        to_materialize: Views that it belongs to and that the online store does not hold yet.
    """

    run: str
    was: str | None
    encoder: str
    to_materialize: tuple[str, ...]


def list_versions(home: Home) -> Versions:
    """Look at the home's folders; nothing is opened but manifests."""
    manifests = [load_run_manifest(home, run) for run in finished_runs(home)]
    now = load_current_run(home) if home.current_run.exists() else None
    served = {m.encoder_fingerprint for m in manifests if now and m.run == now.run}
    current = load_encoder(home).fingerprint if home.encoder.exists() else None
    encoders = []
    for path in sorted(home.embeddings.glob(f"*/{ENCODER_FILE}")):
        encoder = EncoderManifest.load(path, made_by="longtrail encode")
        encoders.append(
            EncoderVersion(
                fingerprint=encoder.fingerprint,
                model=encoder.model,
                split_layer=encoder.split_layer,
                width=encoder.width,
                created=datetime.fromtimestamp(path.stat().st_mtime, UTC),
                size_bytes=folder_size(path.parent),
                runs=tuple(
                    m.run for m in manifests if m.encoder_fingerprint == encoder.fingerprint
                ),
                current=encoder.fingerprint == current,
                served=encoder.fingerprint in served,
            )
        )
    runs = [
        RunVersion(
            run=m.run,
            recipe=m.recipe,
            created=m.created,
            encoder=m.encoder_fingerprint,
            size_bytes=sum(folder_size(folder) for folder in run_folders(home, m.run)),
            exported=all((home.view(view) / m.run).is_dir() for view in RUN_VIEWS),
            test_auc=m.metrics.get("test", {}).get("auc"),
            current=bool(now and m.run == now.run),
            before=bool(now and now.before[-1:] == (m.run,)),
        )
        for m in manifests
    ]
    runs.sort(key=lambda run: (run.created, run.run), reverse=True)
    return Versions(tuple(encoders), tuple(runs))


def promote(home: Home, profile: str, run: str) -> Switch:
    """Serve a run: its model, the vectors of its encoder, its vectors of users and items.

    Args:
        home: Where the run is.
        profile: Whose registry then names this version in the service of retrieval.
        run: Name of a finished run.

    Raises:
        ArtifactError: If there is no such run, or it does not fit what the store holds.
        MissingStepError: If nothing was applied.
        StoreError: If the store cannot be reached.
    """
    return _switch(home, profile, run, lambda: set_current_run(home, run))


def roll_back(home: Home, profile: str) -> Switch:
    """Serve the run before again; see :func:`promote`.

    Raises:
        ArtifactError: If no run was served before, or it does not fit any more.
    """
    return _switch(home, profile, previous_run(home), lambda: set_previous_run(home))


def _switch(home: Home, profile: str, run: str, change: Callable[[], object]) -> Switch:
    manifest = load_run_manifest(home, run)
    check_fit(home, profile, manifest)
    was = current_run(home) if home.current_run.exists() else None
    change()
    apply(home, profile)
    return Switch(run, was, manifest.encoder_fingerprint, _not_online(home, profile, manifest))


def check_fit(home: Home, profile: str, manifest: ArtifactManifest) -> None:
    """Make sure that a run can be served from a store.

    Raises:
        ArtifactError: If the vectors of its encoder are gone, or the store lacks what it reads.
        MissingStepError: If nothing was applied.
    """
    run, folder = manifest.run, home.embeddings / manifest.encoder_fingerprint
    if not (folder / ENCODER_FILE).exists() or not any(folder.glob("*.parquet")):
        raise ArtifactError(
            f"run {run!r} reads vectors of encoder {manifest.encoder_fingerprint}, which are not "
            "in the home any more: run `longtrail encode` with that encoder, or choose another run"
        )
    width = EncoderManifest.load(folder / ENCODER_FILE, made_by="longtrail encode").width
    if manifest.encoder_width != width:
        raise ArtifactError(
            f"run {run!r} reads vectors of {manifest.encoder_width} numbers, those of encoder "
            f"{manifest.encoder_fingerprint} have {width}: train a new run with `longtrail train`"
        )
    reader = FeatureReader(home, profile)
    has = {
        "scene": reader.manifest.scenes,
        "user feature": reader.user_dense_names,
        "item feature": reader.item_dense_names,
        "category": reader.item_category_names,
    }
    reads = {
        "scene": manifest.scenes,
        "user feature": manifest.user_dense_names,
        "item feature": manifest.item_dense_names,
        "category": tuple(manifest.category_vocabularies),
    }
    for what, names in reads.items():
        if missing := [name for name in names if name not in has[what]]:
            raise ArtifactError(
                f"run {run!r} reads the {what} {missing[0]!r}, which the feature store does not "
                "have: train a new run with `longtrail train`"
            )
    if manifest.sequence_length > reader.sequence_length:
        raise ArtifactError(
            f"run {run!r} reads {manifest.sequence_length} behaviours per scene, the feature store "
            f"keeps {reader.sequence_length}: train a new run with `longtrail train`"
        )


def run_views(home: Home, manifest: ArtifactManifest) -> tuple[str, ...]:
    """Names of the views that belong to a run: those without versions, and its own of the others.

    Its own are there as far as they have rows in the home.
    """
    own = {encoder_view(manifest.encoder_fingerprint)}
    own |= {run_view(entity, manifest.run) for entity in ENTITIES}
    names = (view.name for view in define(home).views)
    return tuple(name for name in names if name in own or unversioned(name) == name)


def run_folders(home: Home, run: str) -> list[Path]:
    """Everything that a run left: its artifact and what was exported."""
    return [home.runs / run, *(home.view(view) / run for view in RUN_VIEWS)]


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _not_online(home: Home, profile: str, manifest: ArtifactManifest) -> tuple[str, ...]:
    """Views of a run of which the online store holds nothing, or but a part."""
    states = copied_views(home, profile)
    done = {name for name, state in states.items() if state.end is not None}
    return tuple(name for name in run_views(home, manifest) if name not in done)
