"""Step ``tune``: a language model learns which behaviours go together, before it is frozen.

The result is a model folder that ``encode --model FOLDER`` takes like any other::

    config.json, model.safetensors, tokenizer files
    tuning.json     what it was made from, and what it brought (:class:`TuningManifest`)
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import AwareDatetime

from encoders.checkpoint import open_checkpoint
from encoders.config import TuningConfig, TuningRecipe
from encoders.cooccurrence import NEXT_BASKET, SAME_BASKET, count_pairs
from encoders.fingerprint import describe_encoder
from encoders.layout import keep_layers, layer_stack
from encoders.pretrained import load_model, load_tokenizer, quiet_transformers
from encoders.text_encoder import TextEncoder
from encoders.tuner import Tuner, TuningState
from encoders.tuning_period import (
    choose_until,
    held_out_pairs,
    next_basket_auc,
    seen_labels,
)
from feature_repo.errors import EncoderError
from feature_repo.home import Home, complete_folder
from feature_repo.manifest import Document, load_manifest
from feature_repo.progress import Progress, silent
from feature_repo.revision import git_revision

MANIFEST_FILE = "tuning.json"
_CHUNK_TEXTS = 8192
"""Texts tokenised at once."""

_GAPS: dict[TuningRecipe, tuple[int, ...]] = {
    "co_occurrence": (SAME_BASKET, NEXT_BASKET),
    "next_behavior": (NEXT_BASKET,),
}


class HeldOut(Document):
    """How near the vectors of consecutive baskets are, on behaviour that tuning did not see.

    The share of others that are farther, see :func:`encoders.tuning_period.next_basket_auc`.
    """

    num_pairs: int
    before: float | None
    """With the model that was tuned, at the same layer."""
    after: float | None


class TuningManifest(Document):
    """What a tuned model was made from."""

    format: Literal[1] = 1
    created: AwareDatetime
    base_model: str
    base_model_fingerprint: str
    split_layer: int
    """Layer that the loss was taken at: ``encode`` should split there."""
    recipe: TuningRecipe
    until: AwareDatetime
    """Only events strictly before it were used."""
    steps: int
    seed: int
    config: dict[str, Any]
    dataset: str
    source_fingerprint: str
    git_revision: str | None
    num_texts: int
    num_pairs: int
    """Distinct pairs of texts."""
    user_share: float
    """Share of the users that was counted."""
    seen_labels: dict[str, int]
    """Split -> impressions before ``until``: rows whose labels this encoder has seen."""
    losses: list[float]
    """One per step, see :func:`encoders.tuner.co_occurrence_loss`: below 0 = better than chance."""
    held_out: HeldOut


@dataclass(frozen=True)
class TuningSummary:
    """What a run of tune did."""

    folder: Path
    manifest: TuningManifest
    steps_resumed: int
    """Steps that a run before this one had done."""
    seconds: float


def tune(
    home: Home,
    config: TuningConfig,
    folder: Path,
    *,
    until: datetime | None = None,
    progress: Progress = silent,
) -> TuningSummary:
    """Tune a model on which behaviours go together, and write it to ``folder``.

    See :class:`encoders.tuner.Tuner` for the layers that the loss is taken at and trains. The same
    settings, events before ``until`` and number of threads give the same weights; a run that was
    killed goes on from its last checkpoint and ends with them too.

    Args:
        home: The home folder; ingest has been run.
        config: How.
        folder: Made by this; must not exist.
        until: Only events strictly before it are used, UTC; None: see
            :func:`encoders.tuning_period.choose_until`.
        progress: Told steps and loss.

    Raises:
        EncoderError: If the folder exists, the model cannot be used, or the loss diverges.
        DataSetError: If there are no events or no pairs before ``until``.
        MissingStepError: If nothing has been ingested.
        ValueError: If ``until`` has no time zone.

    Source:
        Chen et al., "HLLM", 2024, arXiv:2409.12740, tunes the item model before it is frozen; the
        loss on co-occurrence is ours.
    """
    started = time.perf_counter()
    if until is not None and until.tzinfo is None:
        raise ValueError(f"until must say its time zone, got {until.isoformat()}")
    folder = folder.expanduser().resolve()
    if folder.exists():
        raise EncoderError(f"{folder} exists already: give another folder, or delete it")
    data_manifest = load_manifest(home)
    if until is None:
        until = choose_until(home, data_manifest)
    data = count_pairs(home, start=data_manifest.first_event, stop=until, gaps=_GAPS[config.recipe])
    description = describe_encoder(config.encoder)
    split_layer = description.split_layer
    held_out = held_out_pairs(home, data_manifest, until)
    with quiet_transformers():
        encoder = TextEncoder.load(description, batch_tokens=config.encoder.batch_tokens)
        tokens = encoder.tokenize(
            data.texts[first : first + _CHUNK_TEXTS]
            for first in range(0, len(data.texts), _CHUNK_TEXTS)
        )
        before = next_basket_auc(held_out, encoder.encode)
        tokenizer = load_tokenizer(config.encoder.model)
        model = load_model(config.encoder.model)
        keep_layers(model, 0, len(layer_stack(model)))  # all of them, without a pooler
    identity = [
        *(asdict(config), description.fingerprint, data_manifest.source_fingerprint),
        until.isoformat(),
    ]
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    with open_checkpoint(
        folder, fingerprint, TuningState, what=f"the tuning of {folder}", error=EncoderError
    ) as checkpoint:
        tuner = Tuner(model, split_layer, tokens, tokenizer.pad_token_id or 0, data, config)
        steps_resumed = tuner.restore(checkpoint)
        tuner.run(checkpoint, progress)
        with complete_folder(folder) as part:
            with quiet_transformers():
                model.save_pretrained(part)
                tokenizer.save_pretrained(part)
                # Measured through the files and the code that encode will use.
                tuned = replace(config.encoder, model=str(part), split_layer=split_layer)
                after = next_basket_auc(held_out, TextEncoder.load(describe_encoder(tuned)).encode)
            manifest = TuningManifest(
                created=datetime.now(UTC),
                base_model=description.model,
                base_model_fingerprint=description.model_fingerprint,
                split_layer=split_layer,
                recipe=config.recipe,
                until=until,
                steps=config.steps,
                seed=config.seed,
                config=asdict(config),
                dataset=data_manifest.dataset,
                source_fingerprint=data_manifest.source_fingerprint,
                git_revision=git_revision(),
                num_texts=len(data.texts),
                num_pairs=len(data.counts),
                user_share=data.user_share,
                seen_labels=seen_labels(home, until),
                losses=tuner.losses,
                held_out=HeldOut(num_pairs=len(held_out), before=before, after=after),
            )
            manifest.save(part / MANIFEST_FILE)
    return TuningSummary(folder, manifest, steps_resumed, time.perf_counter() - started)
