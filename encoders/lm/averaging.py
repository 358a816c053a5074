"""Step ``lm average``: the mean of the weights that a pretraining kept on its way.

The result is a model folder like the one it was made from, with ``averaging.json``
(:class:`AveragingManifest`) in it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import AwareDatetime
from safetensors.torch import load_file
from torch import Tensor

from encoders.fingerprint import model_fingerprint
from encoders.lm.documents import start_token
from encoders.lm.held_out_documents import no_documents
from encoders.lm.loss import LanguageModelLoss
from encoders.lm.model_folder import (
    check_model_name,
    finished_model,
    load_language_model,
    save_language_model,
)
from encoders.lm.shards import make_shards
from encoders.lm.snapshots import model_snapshots
from encoders.lm.validation import ALL, ValidationTexts
from feature_repo.errors import EncoderError
from feature_repo.home import Home, complete_folder
from feature_repo.manifest import Document
from feature_repo.progress import Progress, silent
from feature_repo.revision import git_revision

AVERAGING_FILE = "averaging.json"
VALIDATION_BYTES = 100_000
"""Of each source, on which the averaged weights are compared with the single ones."""


class AveragingManifest(Document):
    """What an average was made from, and what it brought."""

    format: Literal[1] = 1
    created: AwareDatetime
    model: str
    """Folder of the model whose weights were averaged."""
    model_fingerprint: str
    steps: list[int]
    """Whose weights were averaged."""
    single: dict[int, dict[str, float]]
    """Step -> source -> bits per byte on the valid split; ``all`` = together."""
    average: dict[str, float]
    """The same of the average."""
    best_single: int
    """Step with the fewest bits per byte."""
    gain: float
    """Bits per byte of the best single weights less those of the average: above 0 = better."""
    validation_bytes: int
    git_revision: str | None


@dataclass(frozen=True)
class AveragingSummary:
    """What a run of average did."""

    folder: Path
    manifest: AveragingManifest
    seconds: float


def average(
    home: Home,
    model_folder: Path,
    *,
    last: int | None = None,
    name: str | None = None,
    validation_bytes: int = VALIDATION_BYTES,
    device: torch.device = torch.device("cpu"),  # noqa: B008  # immutable
    progress: Progress = silent,
) -> AveragingSummary:
    """Average the last kept weights of a pretraining, and write them to ``home.models / name``.

    Args:
        home: Its corpus measures what the average brings.
        model_folder: Of :func:`encoders.lm.pretraining.pretrain`.
        last: K, at least 2; None = all that were kept.
        name: Of the new model; None = ``<model>-average``.
        validation_bytes: Of each source of the valid split.
        device: Where the weights are measured.
        progress: Told weights measured.

    Raises:
        EncoderError: If the model has not so many kept weights, or the result is there already,
            from other weights.
        MissingStepError: If there is no corpus, or it is of other tables.
        DataSetError: If its valid split is empty, so that nothing tells which weights are better.

    Source:
        Herold et al., "LiLiuM", 2024, arXiv:2406.12023; Izmailov et al., "Averaging Weights Leads
        to Wider Optima and Better Generalization", 2018, arXiv:1803.05407.
    """
    started = time.perf_counter()
    kept = model_snapshots(model_folder)
    number = len(kept) if last is None else last
    if not 2 <= number <= len(kept):
        raise EncoderError(
            f"{model_folder} keeps the weights of {len(kept)} steps, {number} were asked for: "
            "an average needs at least two; give another --last, or another model"
        )
    chosen = dict(list(kept.items())[-number:])
    name = name or f"{model_folder.name}-average"
    check_model_name(name)
    folder = home.models / name
    fingerprint = model_fingerprint(model_folder)
    made_from = (fingerprint, list(chosen), validation_bytes)
    there = finished_model(
        folder,
        AVERAGING_FILE,
        AveragingManifest,
        made_by="longtrail lm average",
        is_same=lambda m: (m.model_fingerprint, m.steps, m.validation_bytes) == made_from,
        otherwise="from other weights",
    )
    if there is not None:
        return AveragingSummary(folder, there, time.perf_counter() - started)
    model, tokenizer = load_language_model(model_folder)
    texts = ValidationTexts.choose(make_shards(home, tokenizer)["valid"], validation_bytes)
    if not texts.documents:
        raise no_documents("valid")
    loss = LanguageModelLoss(model.to(device)).eval()
    start = start_token(tokenizer)

    def measure(weights: dict[str, Tensor]) -> dict[str, float]:
        load_parameters(model, weights, str(model_folder))
        figures = texts.bits_per_byte(loss, start=start, device=device, precision="float32")
        progress(1, number + 1, bits_per_byte=figures[ALL])
        return figures

    progress(0, number + 1)
    single = {step: measure(load_file(path)) for step, path in chosen.items()}
    averaged = measure(mean_weights(list(chosen.values())))
    best = min(single, key=lambda step: single[step][ALL])
    manifest = AveragingManifest(
        created=datetime.now(UTC),
        model=str(model_folder),
        model_fingerprint=fingerprint,
        steps=list(chosen),
        single=single,
        average=averaged,
        best_single=best,
        gain=single[best][ALL] - averaged[ALL],
        validation_bytes=validation_bytes,
        git_revision=git_revision(),
    )
    with complete_folder(folder) as part:
        save_language_model(model, tokenizer, part)
        manifest.save(part / AVERAGING_FILE)
    return AveragingSummary(folder, manifest, time.perf_counter() - started)


def mean_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of weights of equal names and shapes, float32; memory for two of them."""
    mean: dict[str, Tensor] = {}
    for path in files:
        for name, weight in load_file(path).items():
            part = weight.float() / len(files)
            mean[name] = mean[name] + part if name in mean else part
    return mean


@torch.no_grad()
def load_parameters(model: Any, weights: dict[str, Tensor], source: str) -> None:
    """Put weights into a model, by parameter name.

    Raises:
        EncoderError: If they are not the model's.
    """
    parameters = dict(model.named_parameters())
    for name in sorted(parameters.keys() | weights.keys()):
        one, other = parameters.get(name), weights.get(name)
        if one is None or other is None or one.shape != other.shape:
            shapes = [None if t is None else list(t.shape) for t in (one, other)]
            raise EncoderError(
                f"weights in {source} do not belong to its model: {name} has the shape {shapes[0]} "
                f"in the model, {shapes[1]} in the weights"
            )
        one.copy_(other)
