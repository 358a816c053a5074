"""The newest impressions against the training rows of a run."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from feature_repo import sequences
from feature_repo.artifact import REFERENCE_FILE, load_run_manifest
from feature_repo.drift import Drift, Reference, compare
from feature_repo.errors import ArtifactError, NothingToCompareError
from feature_repo.home import Home
from feature_repo.progress import Progress, silent
from feature_repo.reader import FeatureReader
from feature_repo.version_names import encoder_view
from feature_repo.versions import run_views
from training.dataset import read_clicks
from training.impressions import impressions_between
from training.reference import HISTORY, RowCounter
from training.sources import Sources


@dataclass(frozen=True)
class WindowDrift:
    """How a window compares.

    Args:
        run: Whose training rows it was held against.
        start: First moment of the window, UTC.
        end: Its end: the data set's "now".
        window: What was counted in it.
        reference: Of the training rows.
        drift: The comparison.
        views: Names of the feature views that the run reads.
    """

    run: str
    start: datetime
    end: datetime
    window: Reference
    reference: Reference
    drift: Drift
    views: tuple[str, ...]


def measure_drift(
    sources: Sources,
    run: str,
    *,
    window: timedelta,
    threshold: float,
    progress: Progress = silent,
) -> WindowDrift:
    """Read the features of the window's impressions as training would, and compare.

    Memory is that of a chunk of impressions, whatever the window.

    Args:
        sources: What to read from.
        run: Name of a finished run.
        window: How far back from the data set's "now"; above 0.
        threshold: Of the PSI and of the cosine distance, above 0.
        progress: Told impressions read.

    Raises:
        ArtifactError: If there is no such run, it has no reference, or the store lacks what it
            reads.
        EncoderError: If the vectors that it was trained on are gone.
        DataSetError: If the data set has no impressions at all.
        NothingToCompareError: If the window has none.
    """
    manifest = load_run_manifest(sources.home, run)
    reference = load_reference(sources.home, run)
    sources = sources.with_encoder(manifest.encoder_fingerprint)
    end = sources.manifest.now()
    start = end - window
    counter = RowCounter(reference.distributions, sources.table, manifest.scenes)
    found = False
    for impressions in impressions_between(sources.home, sources.manifest, start, end):
        found = True
        data = read_clicks(
            impressions,
            sources.reader,
            sources.table,
            scenes=manifest.scenes,
            sequence_length=manifest.sequence_length,
            vocabularies=manifest.category_vocabularies,
            user_dense_names=manifest.user_dense_names,
            item_dense_names=manifest.item_dense_names,
            progress=progress,
        )
        counter.add(data)
    if not found:
        raise NothingToCompareError(
            f"there are no impressions between {start:%Y-%m-%d %H:%M} and {end:%Y-%m-%d %H:%M} "
            "UTC: choose a longer --window"
        )
    counted = counter.reference()
    return WindowDrift(
        run=run,
        start=start,
        end=end,
        window=counted,
        reference=reference,
        drift=compare(
            reference, counted, threshold=threshold, views=_views_of_features(sources, reference)
        ),
        views=run_views(sources.home, manifest),
    )


def _views_of_features(sources: Sources, reference: Reference) -> dict[str, dict[str, str]]:
    """Group -> feature -> the feature view that it is of; what a request makes is left out."""
    if not isinstance(sources.reader, FeatureReader):  # nothing but a feature store has views
        return {}
    users, items = (sources.reader.view_of_feature(entity) for entity in ("user", "item"))
    vectors = encoder_view(sources.table.fingerprint)
    views = {"user": users, "item": items, "category": items}
    for group, view in ((HISTORY, sequences.VIEW), ("text", vectors)):
        views[group] = dict.fromkeys(reference.distributions.get(group, {}), view)
    return views


def load_reference(home: Home, run: str) -> Reference:
    """What the training rows of a run looked like.

    Raises:
        ArtifactError: If it was trained by a version that did not keep it.
    """
    path = home.runs / run / REFERENCE_FILE
    if not path.exists():
        raise ArtifactError(
            f"run {run!r} has no {REFERENCE_FILE}, which drift is measured against: train it again"
        )
    return Reference.load(path, made_by="longtrail train")
