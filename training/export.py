"""Deep outputs of a run as two feature views of its own, one of users and one of items."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from encoders.inputs import history_keys, item_inputs, user_inputs
from feature_repo.artifact import load_run_manifest
from feature_repo.catalog import Catalog
from feature_repo.errors import ArtifactError
from feature_repo.home import complete_folder
from feature_repo.moments import micros
from feature_repo.progress import Progress, silent
from feature_repo.run_rows import run_rows
from feature_repo.version_names import Entity
from training.artifact import load_model
from training.parts import deep_model
from training.sources import Sources

_Rows = tuple[NDArray[np.float32], NDArray[np.int64], dict[str, NDArray[np.int64]]]
"""Vectors, event times in epoch microseconds, and what the vectors were computed from."""
_Compute = Callable[[NDArray[np.object_]], _Rows]

CHUNK = 4096
"""Users or items computed at a time."""


@dataclass(frozen=True)
class ExportResult:
    """What was written."""

    run: str
    num_users: int
    num_items: int
    user_width: int
    item_width: int
    seconds: float


def export_embeddings(
    sources: Sources, run: str, *, users: Progress = silent, items: Progress = silent
) -> ExportResult:
    """Write the deep output of every user and item as of the data set's "now".

    The two views of a run are its own; its files are replaced as a whole. A user's row is stamped
    with the time of their last behaviour, an item's with "now".

    Args:
        sources: What to read from.
        run: Name of a finished run of a model with a deep half.
        users: Told users done.
        items: Told items done.

    Raises:
        ArtifactError: If there is no such run, it has no deep outputs, or it does not fit the
            feature store.
        EncoderError: If the vectors that it was trained on are gone.
    """
    started = time.monotonic()
    manifest = load_run_manifest(sources.home, run)
    sources = sources.with_encoder(manifest.encoder_fingerprint)
    model = deep_model(load_model(sources, manifest))
    if model is None:
        raise ArtifactError(
            f"run {run!r} is a {manifest.recipe} model, which has no deep outputs to export (none "
            "at all, or attention over states reads more than these): choose a run of a bahe recipe"
        )
    now = sources.manifest.now()
    now_us = micros(now)
    table = torch.from_numpy(sources.table.vectors)

    def user_rows(ids: NDArray[np.object_]) -> _Rows:
        features = sources.reader.historical_users(ids, np.full(len(ids), now_us))
        whole = user_inputs(features, sources.table, scenes=manifest.scenes)
        keys = history_keys(features, whole, manifest.scenes, model.config.deep_length)
        inputs = whole.last(manifest.sequence_length)
        vectors = model.user_vectors(
            table, torch.from_numpy(inputs.history_rows), torch.from_numpy(inputs.history_ages)
        )
        last = np.max([s.timestamps.max(axis=1) for s in features.sequences.values()], axis=0)
        origin = {"history_key": keys, "computed_time": np.full(len(ids), now_us // 1_000_000)}
        times = np.where(last > 0, last * 1_000_000, now_us)
        return vectors.flatten(1).numpy(), times, origin

    def item_rows(ids: NDArray[np.object_]) -> _Rows:
        features = sources.reader.historical_items(ids, np.full(len(ids), now_us))
        inputs = item_inputs(features, sources.table, vocabularies=manifest.category_vocabularies)
        vectors = model.item_vectors(table, torch.from_numpy(inputs.candidate_rows))
        return vectors.numpy(), np.full(len(ids), now_us), {"text_id": features.text_ids}

    user_ids, item_ids = _user_ids(sources.home.events), Catalog.load(sources.home).item_ids
    widths = []
    jobs: tuple[tuple[Entity, NDArray[np.object_], _Compute, Progress], ...] = (
        ("user", user_ids, user_rows, users),
        ("item", item_ids, item_rows, items),
    )
    for entity, ids, compute, progress in jobs:
        with complete_folder(sources.home.view(f"{entity}_embeddings") / run) as folder:
            writer: pq.ParquetWriter | None = None
            try:
                for start in range(0, len(ids), CHUNK):
                    chunk = ids[start : start + CHUNK]
                    with torch.inference_mode():
                        vectors, times, origin = compute(chunk)
                    rows = run_rows(entity, chunk, vectors, run=run, times=times, origin=origin)
                    if writer is None:
                        widths.append(vectors.shape[1])
                        writer = pq.ParquetWriter(
                            folder / "part-00000.parquet", rows.schema, compression="zstd"
                        )
                    writer.write_table(rows)
                    progress(len(chunk), len(ids))
            finally:
                if writer is not None:
                    writer.close()
    return ExportResult(
        run=run,
        num_users=len(user_ids),
        num_items=len(item_ids),
        user_width=widths[0],
        item_width=widths[1],
        seconds=time.monotonic() - started,
    )


def _user_ids(events: Path) -> NDArray[np.object_]:
    """Every user with an event, sorted."""
    ids: set[str] = set()
    for path in sorted(events.glob("*.parquet")):
        ids.update(pq.read_table(path, columns=["user_id"])["user_id"].unique().to_pylist())
    return np.array(sorted(ids), dtype=object)
