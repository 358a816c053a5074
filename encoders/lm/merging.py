"""Step ``lm merge``: between a model and what became of it, to keep what both are good at.

The result is a model folder with ``merging.json`` (:class:`MergingManifest`) in it.
"""

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch
from pydantic import AwareDatetime

from encoders.fingerprint import model_fingerprint
from encoders.lm.model_folder import (
    check_model_name,
    finished_model,
    load_language_model,
    save_language_model,
)
from encoders.lm.shards import tokenizer_fingerprint
from feature_repo.errors import EncoderError
from feature_repo.home import Home, complete_folder
from feature_repo.manifest import Document
from feature_repo.revision import git_revision

MERGING_FILE = "merging.json"


class MergingManifest(Document):
    """What a merged model was made from."""

    format: Literal[1] = 1
    created: AwareDatetime
    base_model: str
    base_model_fingerprint: str
    tuned_model: str
    tuned_model_fingerprint: str
    weight: float
    """Of the tuned model; the base has the rest."""
    git_revision: str | None


@dataclass(frozen=True)
class MergingSummary:
    """What a run of merge did."""

    folder: Path
    manifest: MergingManifest
    seconds: float


def merge(
    home: Home, base: Path, tuned: Path, *, weight: float, name: str | None = None
) -> MergingSummary:
    """Write ``(1 - weight) x base + weight x tuned`` to ``home.models / name``.

    Where just that is there already, nothing is done.

    Args:
        home: Where the merged model goes.
        base: Folder of a model.
        tuned: Folder of a model of the same shape and vocabulary, usually learned from the base.
        weight: Of the tuned model, in [0, 1].
        name: Of the merged model; None = ``<tuned>-merged``.

    Raises:
        EncoderError: If the weight is outside its range, the models do not have the same shape and
            vocabulary, or something else has the name.

    Source:
        Herold et al., "Domain Adaptation of Foundation LLMs for e-Commerce" (e-Llama), 2025,
        arXiv:2501.09706: merging with the base model sets how much general skill is kept.
    """
    started = time.perf_counter()
    if not 0 <= weight <= 1:
        raise EncoderError(f"the weight of the tuned model must be in [0, 1], got {weight}")
    name = name or f"{tuned.name}-merged"
    check_model_name(name)
    folder = home.models / name
    base_fingerprint, tuned_fingerprint = model_fingerprint(base), model_fingerprint(tuned)
    made_from = (base_fingerprint, tuned_fingerprint, weight)
    there = finished_model(
        folder,
        MERGING_FILE,
        MergingManifest,
        made_by="longtrail lm merge",
        is_same=lambda m: (
            (m.base_model_fingerprint, m.tuned_model_fingerprint, m.weight) == made_from
        ),
        otherwise="from other models or with another weight",
    )
    if there is not None:
        return MergingSummary(folder, there, time.perf_counter() - started)
    model, tokenizer = load_language_model(base)
    other, other_tokenizer = load_language_model(tuned)
    if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(other_tokenizer):
        raise EncoderError(
            f"{base} and {tuned} have different tokenizers, so that their weights mean different "
            "tokens: merge a model with one that was learned from it"
        )
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    for key in sorted(ours.keys() | theirs.keys()):
        shapes = [list(m[key].shape) if key in m else None for m in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise EncoderError(
                f"{base} and {tuned} are not of the same shape: {key} has {shapes[0]} in the "
                f"first and {shapes[1]} in the second; merge a model with one learned from it"
            )
    with torch.no_grad():
        for key, parameter in ours.items():
            parameter.lerp_(theirs[key], weight)
    manifest = MergingManifest(
        created=datetime.now(UTC),
        base_model=str(base),
        base_model_fingerprint=base_fingerprint,
        tuned_model=str(tuned),
        tuned_model_fingerprint=tuned_fingerprint,
        weight=weight,
        git_revision=git_revision(),
    )
    with complete_folder(folder) as part:
        save_language_model(model, tokenizer, part)
        manifest.save(part / MERGING_FILE)
    return MergingSummary(folder, manifest, time.perf_counter() - started)
