"""How good a run is on any labelled rows, scored by the program that serving runs."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from feature_repo.artifact import PROGRAM_FILE
from feature_repo.progress import Progress, silent
from training.artifact import load_manifest
from training.dataset import read_clicks
from training.impressions import load_impressions, load_impressions_file
from training.metrics import summarize
from training.program import load_program
from training.schema import InputSchema
from training.scoring import probabilities, score
from training.slices import slice_masks
from training.sources import Sources


@dataclass(frozen=True)
class Evaluation:
    """Figures of one run on one set of rows."""

    run: str
    rows: str
    """The split or the file."""
    metrics: dict[str, Any]
    slices: dict[str, dict[str, Any]]
    notes: list[str]
    seconds: float


def evaluate(
    sources: Sources,
    run: str,
    *,
    split: str = "test",
    impressions: Path | None = None,
    reading: Progress = silent,
    scoring: Progress = silent,
) -> Evaluation:
    """Score a run and measure it, on all rows and on the slices of :mod:`training.slices`.

    Args:
        sources: What to read from.
        run: Name of a finished run.
        split: Of the data set's own impressions.
        impressions: A labelled file to use instead.
        reading: Told impressions read.
        scoring: Told rows scored.

    Raises:
        ArtifactError: If there is no such run, or it does not fit the feature store.
        DataSetError: If the rows are not usable.
    """
    started = time.monotonic()
    manifest = load_manifest(sources.home, run)
    sources.check_table(run, manifest.encoder_fingerprint)
    schema = InputSchema.of(manifest)
    notes: list[str] = []
    if impressions is None:
        rows = load_impressions(sources.home, sources.manifest, split)
    else:
        rows = load_impressions_file(impressions, schema.context_names)
        empty = [
            name
            for column, name in enumerate(schema.context_names)
            if (rows.context[:, column] != rows.context[:, column]).all()
        ]
        if empty:
            notes.append(f"missing in every row: {', '.join(empty)}")
    data = read_clicks(
        rows,
        sources.reader,
        sources.table,
        scenes=schema.scenes,
        sequence_length=schema.sequence_length,
        vocabularies=schema.category_vocabularies,
        user_dense_names=schema.user_dense_names,
        item_dense_names=schema.item_dense_names,
        progress=reading,
    )
    program = load_program(sources.home.runs / run / PROGRAM_FILE)
    table = torch.from_numpy(sources.table.vectors)
    chances = probabilities(score(program, table, data, truncate=False, progress=scoring))
    users = data.user_codes
    masks = slice_masks(sources.home, data, train_end=manifest.train_end)
    return Evaluation(
        run=run,
        rows=split if impressions is None else str(impressions),
        metrics=summarize(data.clicked, chances, users),
        slices={
            name: summarize(data.clicked[mask], chances[mask], users[mask])
            for name, mask in masks.items()
        },
        notes=notes,
        seconds=time.monotonic() - started,
    )
