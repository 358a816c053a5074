"""What an artifact folder says about itself: the only thing that training and serving share.

``runs/<run>/``::

    manifest.json       this document
    weights.safetensors the trained weights
    score.pt2           the exported program: program inputs -> logits
    users.pt2           in its place, where the model has deep outputs, what it is made of
    items.pt2           (:class:`ProgramParts`)
    head.pt2
    reference.json      how the training rows were distributed (:mod:`feature_repo.drift`)

The program's inputs, in order, are those of :data:`PROGRAM_INPUTS`; ``encoders.inputs`` builds them
from what the reader returns, in the same way for training and serving.
"""

from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from pydantic import AwareDatetime, Field

from feature_repo.errors import ArtifactError, MissingStepError
from feature_repo.home import Home
from feature_repo.manifest import Document, load_encoder

MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"
PROGRAM_FILE = "score.pt2"
USER_FILE = "users.pt2"
ITEM_FILE = "items.pt2"
HEAD_FILE = "head.pt2"
REFERENCE_FILE = "reference.json"

PROGRAM_INPUTS = (
    "table",
    "history_rows",
    "history_item_keys",
    "history_ages",
    "history_totals",
    "user_dense",
    "candidate_rows",
    "candidate_item_keys",
    "candidate_dense",
    "candidate_categories",
    "context",
    "evidence",
)
"""Shapes: B = contexts (one user at one time), S = scenes, M = behaviours per scene, C = candidates
per context, D = vector width, V = table rows.

table                 float32 [V, D]     row 0 is all zero: "no text"
history_rows          int64   [B, S, M]  rows of ``table``, 0 = nothing there; newest at M-1
history_item_keys     int64   [B, S, M]
history_ages          float32 [B, S, M]  seconds before the request
history_totals        float32 [B, S]     behaviours of all time
user_dense            float32 [B, Fu]    NaN = missing
candidate_rows        int64   [B, C]
candidate_item_keys   int64   [B, C]     0 = padding
candidate_dense       float32 [B, C, Fi] NaN = missing
candidate_categories  int64   [B, C, K]  index into the vocabulary, 0 = unknown or missing
context               float32 [B, C, Fx] NaN = missing
evidence              float32 [B, C, E]  of ``encoders.evidence``; NaN = nothing to say

Output: float32 [B, C], logits.
"""


class Calibration(Document):
    """A strictly increasing, piecewise linear map of logits; the exported program applies it."""

    method: Literal["none", "platt", "isotonic"]
    knots: tuple[float, ...]
    """Ascending, at least one; logits of the model itself."""
    values: tuple[float, ...]
    """Calibrated logits at the knots, ascending."""
    slope_below: float
    """Below the first knot; above 0."""
    slope_above: float
    """Above the last knot; above 0."""
    cross_validated_logloss: dict[str, float] = Field(default_factory=dict)
    """Method -> mean logloss on validation users that the map was not fitted on."""


class ProgramParts(Document):
    """The program in three, for a model whose users and items meet in its head alone.

    ``users.pt2``: table, history_rows, history_ages -> deep outputs [B, S, Q].
    ``items.pt2``: table, candidate_rows [R] -> deep outputs [R, Q].
    ``head.pt2``: both, [B, S, Q] and [B, C, Q], and all of the program's inputs -> logits [B, C].
    """

    output_width: int
    """Q."""
    deep_length: int
    """Behaviours per scene that a user's deep outputs depend on, the newest ones."""
    age_edges_s: tuple[float, ...]
    """Ages in seconds at which a behaviour's part in them changes, ascending; between two of them
    it does not. Empty where ages have no part."""


class ArtifactManifest(Document):
    """A trained model."""

    format: Literal[1] = 1
    run: str
    created: AwareDatetime
    dataset: str
    source_fingerprint: str
    feature_service: str
    scenes: tuple[str, ...]
    sequence_length: int
    """M, of the program's inputs; evidence is taken from all that the store keeps."""
    user_dense_names: tuple[str, ...]
    item_dense_names: tuple[str, ...]
    context_names: tuple[str, ...]
    evidence_names: tuple[str, ...]
    evidence_kinds: tuple[str, ...] | None = None
    """The first parts of the names of those that the program reads, so that the others need not be
    computed; None = it may read all."""
    category_vocabularies: dict[str, tuple[str, ...]]
    """Column -> values; value i has index i + 1."""
    encoder_fingerprint: str
    """Of the embedding table that the weights were trained on."""
    encoder_width: int
    recipe: str
    config: dict[str, Any]
    seed: int
    git_revision: str | None
    versions: dict[str, str]
    train_start: AwareDatetime
    train_end: AwareDatetime
    metrics: dict[str, dict[str, Any]]
    """Split -> metric -> value."""
    parts: ProgramParts | None = None
    """None where the program is one file."""
    calibration: Calibration | None = None
    """What the program does to the weights' logits; fitted on the validation split."""


class CurrentRun(Document):
    """``runs/current.json``: the run that is served where none is named."""

    run: str
    before: tuple[str, ...] = ()
    """Runs that were served before and can be again, the last one at the end."""


def load_current_run(home: Home) -> CurrentRun:
    """The run that is served, and those before.

    Raises:
        MissingStepError: If nothing has been trained in ``home``, or no run is current.
    """
    if not home.current_run.exists() and (runs := finished_runs(home)):
        raise MissingStepError(
            f"no run in {home.runs} is current: choose one with `longtrail promote RUN` (there "
            f"are: {', '.join(runs)})"
        )
    return CurrentRun.load(home.current_run, made_by="longtrail train")


def current_run(home: Home) -> str:
    """Name of the run that is served; see :func:`load_current_run`."""
    return load_current_run(home).run


def set_current_run(home: Home, run: str) -> None:
    """Serve a run; the one that is served now becomes the last one before."""
    with _only_change(home):
        now = load_current_run(home) if home.current_run.exists() else None
        if now is None or now.run != run:
            before = (*now.before, now.run) if now else ()
            CurrentRun(run=run, before=before).save(home.current_run)


def previous_run(home: Home) -> str:
    """Name of the run that was served before.

    Raises:
        ArtifactError: If there was none.
    """
    now = load_current_run(home)
    if not now.before:
        raise ArtifactError(
            f"no run was served before {now.run!r}: choose one with `longtrail promote RUN`"
        )
    return now.before[-1]


def set_previous_run(home: Home) -> None:
    """Serve the run before again; see :func:`previous_run`."""
    with _only_change(home):
        run, before = previous_run(home), load_current_run(home).before
        CurrentRun(run=run, before=before[:-1]).save(home.current_run)


def forget_runs(home: Home, runs: set[str]) -> None:
    """Take runs that are no more out of those that were served before."""
    with _only_change(home):
        if home.current_run.exists():
            now = load_current_run(home)
            kept = tuple(run for run in now.before if run not in runs)
            CurrentRun(run=now.run, before=kept).save(home.current_run)


def _only_change(home: Home) -> FileLock:
    """Of ``current.json``; it takes milliseconds, so whoever comes second waits."""
    home.runs.mkdir(parents=True, exist_ok=True)
    return FileLock(home.runs / ".current.lock", timeout=10)


def finished_runs(home: Home) -> list[str]:
    """Names of the runs that have an artifact, sorted."""
    return sorted(path.parent.name for path in home.runs.glob(f"*/{MANIFEST_FILE}"))


def load_run_manifest(home: Home, run: str) -> ArtifactManifest:
    """The manifest of a run.

    Raises:
        ArtifactError: If there is no such run, it has no manifest, or is another's copy.
    """
    path = home.runs / run / MANIFEST_FILE
    if not path.is_file():
        raise ArtifactError(
            f"there is no finished run {run!r} in {home.runs}; there are: "
            f"{', '.join(finished_runs(home)) or 'none, run `longtrail train` first'}"
        )
    manifest = ArtifactManifest.load(path, made_by="longtrail train")
    check_run_folder(path.parent, manifest)
    return manifest


def check_run_folder(folder: Path, manifest: ArtifactManifest) -> None:
    """Make sure that a run lies in the folder of its name: views and metrics go by the name.

    Raises:
        ArtifactError: If it does not.
    """
    if manifest.run != folder.name:
        raise ArtifactError(
            f"{folder} holds the run {manifest.run!r}, expected one of the folder's name: give the "
            "folder the run's name, or train a run of that name"
        )


def served_encoder(home: Home) -> str:
    """Fingerprint of the encoder of the run that is served; of the current one where none is.

    Raises:
        MissingStepError: If nothing has been encoded.
    """
    if home.current_run.exists():
        return load_run_manifest(home, current_run(home)).encoder_fingerprint
    return load_encoder(home).fingerprint
