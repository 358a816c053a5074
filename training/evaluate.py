"""How good runs are on any labelled rows, scored by the programs that serving runs.

Shapes: R = labelled rows, N = runs.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from encoders.loaded_artifact import open_programs
from feature_repo.artifact import ArtifactManifest, load_run_manifest
from feature_repo.progress import Progress, in_rounds, silent
from training.comparison import compare, compare_slices
from training.dataset import ClickData, read_clicks
from training.impressions import Impressions, load_impressions, load_impressions_file
from training.metrics import summarize
from training.schema import InputSchema, select_columns
from training.scoring import probabilities, score
from training.slices import slice_masks
from training.sources import Sources


@dataclass(frozen=True)
class ScoredRows:
    """What some runs say about the same labelled rows."""

    rows: str
    """The split or the file."""
    labels: NDArray[np.int64]
    """[R], 0 or 1."""
    users: NDArray[np.int64]
    """[R], a number for every distinct user."""
    masks: dict[str, NDArray[np.bool_]]
    """Slice -> bool [R], True = in it; by the training period of the first run."""
    manifests: dict[str, ArtifactManifest]
    """Run -> what it is."""
    logits: dict[str, NDArray[np.float32]]
    """Run -> float32 [R]."""
    notes: list[str]

    def probabilities(self, runs: Sequence[str]) -> NDArray[np.float64]:
        """Click probabilities of some of the runs, [N, R]."""
        return np.stack([probabilities(self.logits[run]) for run in runs])


@dataclass(frozen=True)
class Evaluation:
    """Figures on one set of rows: of one run, or the means over several."""

    runs: list[str]
    rows: str
    """The split or the file."""
    metrics: dict[str, Any]
    slices: dict[str, dict[str, Any]]
    against: list[str]
    """Runs of the other side; empty = nothing was compared."""
    comparison: dict[str, dict[str, dict[str, float | None]]]
    """``all`` or slice -> figure -> :class:`training.comparison.Difference`; empty likewise."""
    notes: list[str]
    seconds: float


def evaluate(
    sources: Sources,
    runs: str | Sequence[str],
    *,
    against: Sequence[str] = (),
    split: str = "test",
    impressions: Path | None = None,
    reading: Progress = silent,
    scoring: Progress = silent,
) -> Evaluation:
    """Score runs and measure them, on all rows and on the slices of :mod:`training.slices`.

    Args:
        sources: What to read from.
        runs: Name of a finished run, or of several that differ in their seed: the figures are then
            means over them.
        against: Runs to compare with, see :func:`training.comparison.compare`.
        split: Of the data set's own impressions.
        impressions: A labelled file to use instead.
        reading: Told impressions read.
        scoring: Told rows scored.

    Raises:
        ArtifactError: If there is no such run, or it does not fit the feature store.
        EncoderError: If the vectors that a run was trained on are not there.
        DataSetError: If the rows are not usable.
    """
    started = time.monotonic()
    names = [runs] if isinstance(runs, str) else list(runs)
    scored = score_runs(
        sources,
        [*names, *against],
        split=split,
        impressions=impressions,
        reading=reading,
        scoring=scoring,
    )
    return measure(scored, names, against=against, started=started)


def measure(
    scored: ScoredRows, runs: Sequence[str], *, against: Sequence[str] = (), started: float
) -> Evaluation:
    """Figures of scored runs.

    Args:
        scored: Of :func:`score_runs`, with all runs that are named here.
        runs: One run, or several that differ in their seed.
        against: Runs to compare with.
        started: ``time.monotonic()`` when the work began.
    """
    labels, users = scored.labels, scored.users
    chances = scored.probabilities(runs)
    comparison = {}
    if against:
        other = scored.probabilities(against)
        differences = {"all": compare(labels, users, chances, other)}
        differences |= compare_slices(labels, users, chances, other, scored.masks)
        comparison = {
            rows: {figure: asdict(value) for figure, value in by_figure.items()}
            for rows, by_figure in differences.items()
        }
    return Evaluation(
        runs=list(runs),
        rows=scored.rows,
        metrics=summarize(labels, chances, users),
        slices={
            name: summarize(labels[mask], chances[:, mask], users[mask])
            for name, mask in scored.masks.items()
        },
        against=list(against),
        comparison=comparison,
        notes=scored.notes,
        seconds=time.monotonic() - started,
    )


def score_runs(
    sources: Sources,
    runs: Sequence[str],
    *,
    split: str = "test",
    impressions: Path | None = None,
    reading: Progress = silent,
    scoring: Progress = silent,
) -> ScoredRows:
    """Score the same rows with several runs, each on the vectors that it was trained on.

    Runs that read the same columns of the same encoder's table share one reading of the features.

    Args:
        sources: What to read from; tables of other encoders are opened beside its own.
        runs: Names of finished runs, at least one.
        split: Of the data set's own impressions.
        impressions: A labelled file to use instead.
        reading: Told impressions read.
        scoring: Told rows scored.

    Raises:
        ArtifactError: If there is no such run, or it does not fit the feature store.
        EncoderError: If the vectors that a run was trained on are not there.
        DataSetError: If the rows are not usable.
    """
    manifests = {run: load_run_manifest(sources.home, run) for run in runs}
    groups: dict[tuple[object, ...], list[ArtifactManifest]] = {}
    for manifest in manifests.values():
        groups.setdefault(_inputs_of(manifest), []).append(manifest)
    first = manifests[runs[0]]
    logits: dict[str, NDArray[np.float32]] = {}
    masks: dict[str, NDArray[np.bool_]] = {}
    notes: list[str] = []
    for members in groups.values():
        own = sources.with_encoder(members[0].encoder_fingerprint)
        schema = InputSchema.of(members[0])
        rows = load_rows(sources, members[0].run, split, impressions)
        notes += [note for note in _missing_context(rows) if note not in notes]
        longest = max(manifest.sequence_length for manifest in members)
        data = _read(own, rows, schema, longest, in_rounds(reading, len(groups)))
        if first in members:
            masks = slice_masks(sources.home, data, train_end=first.train_end)
        table = torch.from_numpy(own.table.vectors)
        for manifest in members:
            logits[manifest.run] = score(
                open_programs(sources.home.runs / manifest.run, manifest).score,
                table,
                data.last(manifest.sequence_length),
                truncate=False,
                progress=in_rounds(scoring, len(manifests)),
            )
    return ScoredRows(
        rows=split if impressions is None else str(impressions),
        # In every group the same: reading sorts by context, whatever the columns.
        labels=data.clicked,
        users=data.user_codes,
        masks=masks,
        manifests=manifests,
        logits=logits,
        notes=notes,
    )


def _inputs_of(manifest: ArtifactManifest) -> tuple[object, ...]:
    """What two runs must share to be scored on one reading."""
    return (
        manifest.encoder_fingerprint,
        manifest.scenes,
        manifest.user_dense_names,
        manifest.item_dense_names,
        manifest.context_names,
        manifest.evidence_names,
        tuple(sorted(manifest.category_vocabularies.items())),
    )


def load_rows(sources: Sources, run: str, split: str, impressions: Path | None) -> Impressions:
    """The rows of a split or of a file, with the request features that the run reads."""
    if impressions is None:
        return load_impressions(sources.home, sources.manifest, split)
    return load_impressions_file(impressions, load_run_manifest(sources.home, run).context_names)


def _missing_context(rows: Impressions) -> list[str]:
    empty = [
        name
        for column, name in enumerate(rows.context_names)
        if np.isnan(rows.context[:, column]).all()
    ]
    return [f"missing in every row: {', '.join(empty)}"] if empty else []


def _read(
    sources: Sources, rows: Impressions, schema: InputSchema, length: int, progress: Progress
) -> ClickData:
    data = read_clicks(
        rows,
        sources.reader,
        sources.table,
        scenes=schema.scenes,
        sequence_length=length,
        vocabularies=schema.category_vocabularies,
        user_dense_names=schema.user_dense_names,
        item_dense_names=schema.item_dense_names,
        progress=progress,
    )
    evidence = select_columns(
        data.evidence, data.evidence_names, schema.evidence_names, what="evidence"
    )
    return replace(data, evidence=evidence, evidence_names=schema.evidence_names)
