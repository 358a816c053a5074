"""Old versions leave the home and the stores of a profile.

What goes follows from what is kept, never from what an earlier collection did: one that was killed
is finished by the next.
"""

import shutil
from dataclasses import dataclass

from feature_repo.artifact import finished_runs, forget_runs, load_current_run, load_run_manifest
from feature_repo.errors import ArtifactError
from feature_repo.home import Home
from feature_repo.manifest import load_encoder
from feature_repo.materialize import apply, prune_online, remove_online
from feature_repo.postgres_session import Database
from feature_repo.postgres_versions import drop_tables, versioned_tables
from feature_repo.profiles import open_store
from feature_repo.version_names import (
    ENTITIES,
    RUN_VIEWS,
    VERSIONED,
    encoder_view,
    run_view,
    unversioned,
)
from feature_repo.versions import folder_size, run_folders


@dataclass(frozen=True)
class Garbage:
    """What a collection removed, or would remove.

    Args:
        kept_runs: Runs that stay, sorted.
        kept_encoders: Fingerprints of the encoders that stay, sorted.
        runs: Runs that go, with what was exported of them.
        encoders: Fingerprints of the encoders whose vectors go.
        views: Feature views that go.
        tables: Tables that go, in a profile with PostgreSQL.
        online_rows: Rows of those views that leave the online store.
        file_bytes: Freed in the home.
        table_bytes: Freed in PostgreSQL.
    """

    kept_runs: tuple[str, ...]
    kept_encoders: tuple[str, ...]
    runs: tuple[str, ...]
    encoders: tuple[str, ...]
    views: tuple[str, ...]
    tables: tuple[str, ...]
    online_rows: int
    file_bytes: int
    table_bytes: int


def collect_garbage(home: Home, profile: str, *, keep: int, dry_run: bool = False) -> Garbage:
    """Remove the versions that nobody needs any more.

    The served run, the one before and the ``keep`` newest ones stay, with their encoders and the
    current one. Values of removed features leave the online store. Whoever reads a version that
    goes must end first.

    Args:
        home: Where the versions are.
        profile: Whose stores; those of other profiles keep their rows until they are collected,
            too.
        keep: Number of newest runs that stay.
        dry_run: Remove nothing.

    Raises:
        ArtifactError: If ``keep`` is negative, or the manifest of a run that stays is gone.
        StoreError: If a store fails, or another process copies to it.
        LongtrailError: If another process encodes.
    """
    if keep < 0:
        raise ArtifactError(f"--keep must be at least 0, got {keep}")
    kept_runs, kept_encoders = _kept(home, keep)
    runs = sorted((_folders(home, RUN_VIEWS) | set(finished_runs(home))) - kept_runs)
    encoders = sorted(_folders(home, VERSIONED[:1]) - kept_encoders)
    kept_views = {encoder_view(fingerprint) for fingerprint in kept_encoders}
    kept_views |= {run_view(entity, run) for run in kept_runs for entity in ENTITIES}

    store = open_store(home, profile)
    applied = {view.name for view in store.list_feature_views()}
    views = sorted(name for name in applied if _is_version(name) and name not in kept_views)
    database, tables = None, {}
    if store.config.offline_store.type == "postgres":
        database = Database(store.config.offline_store)
        found = versioned_tables(database)
        tables = {name: size for name, size in found.items() if name not in kept_views}
    folders = [folder for run in runs for folder in run_folders(home, run)]
    folders += [home.embeddings / fingerprint for fingerprint in encoders]
    garbage = Garbage(
        kept_runs=tuple(sorted(kept_runs)),
        kept_encoders=tuple(sorted(kept_encoders)),
        runs=tuple(runs),
        encoders=tuple(encoders),
        views=tuple(views),
        tables=tuple(tables),
        online_rows=remove_online(home, profile, views, dry_run=dry_run),
        file_bytes=sum(folder_size(folder) for folder in folders),
        table_bytes=sum(tables.values()),
    )
    if dry_run:
        return garbage
    forget_runs(home, set(runs))
    with home.lock("embeddings"):
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    if views:
        apply(home, profile)
    if database is not None:
        drop_tables(database, list(tables))
    prune_online(home, profile)
    return garbage


def _kept(home: Home, keep: int) -> tuple[set[str], set[str]]:
    """Runs and encoders that stay."""
    finished = finished_runs(home)
    manifests = [load_run_manifest(home, run) for run in finished]
    newest = sorted(manifests, key=lambda m: (m.created, m.run), reverse=True)[:keep]
    runs = {manifest.run for manifest in newest}
    if home.current_run.exists():
        now = load_current_run(home)
        runs |= {now.run, *(run for run in now.before[-1:] if run in finished)}
    encoders = {load_run_manifest(home, run).encoder_fingerprint for run in runs}
    if home.encoder.exists():
        encoders.add(load_encoder(home).fingerprint)
    return runs, encoders


def _folders(home: Home, views: tuple[str, ...]) -> set[str]:
    """Versions of some views that have a folder; a half one is another command's."""
    found = (path for view in views for path in home.view(view).glob("*/"))
    return {path.name for path in found if path.is_dir() and not path.name.endswith(".part")}


def _is_version(view: str) -> bool:
    return unversioned(view) != view
