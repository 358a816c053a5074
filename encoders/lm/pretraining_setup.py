"""What a pretraining needs before its first step: identity, state, mixture, the model in place."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from encoders.checkpoint import Checkpoint, checkpoint_folder, open_checkpoint
from encoders.devices import Devices
from encoders.fingerprint import model_fingerprint
from encoders.lm.corpus import CorpusManifest
from encoders.lm.learning_state import LearningState, RunManifest
from encoders.lm.loss import LanguageModelLoss
from encoders.lm.mixture import CONTINUED_GENERAL_SHARE, mixture
from encoders.lm.recipes import CONTINUED_RATE_SHARE, LearningConfig, PretrainingConfig
from encoders.lm.sharding import shard
from encoders.lm.shards import TokenShard, tokenizer_fingerprint
from feature_repo.errors import EncoderError

Manifest = TypeVar("Manifest", bound=RunManifest)


def finished_run(
    folder: Path, fingerprint: str, kind: type[Manifest], file: str, *, made_by: str
) -> Manifest | None:
    """What a run before this one has finished; None where there is nothing.

    Args:
        folder: Of the model.
        fingerprint: Of all that decides the weights of this run.
        kind: What models of this run tell of themselves.
        file: Where in the folder.
        made_by: Command that makes such models.

    Raises:
        EncoderError: If it is something else.
    """
    # Killed between the model and the end, the run ends once more.
    if not folder.exists() or checkpoint_folder(folder).exists():
        return None
    if (folder / file).exists():
        manifest = kind.load(folder / file, made_by=made_by)
        if manifest.fingerprint == fingerprint:
            return manifest
    raise EncoderError(
        f"there is another model {folder.name!r} in {folder.parent}, made with other settings or "
        "data: give another --name, or delete it"
    )


def prepare_model(model: Any, learning: LearningConfig, devices: Devices) -> LanguageModelLoss:
    """The model on its device, shared out and compiled as configured.

    Args:
        model: Of transformers, on the CPU; may be empty where :func:`encoders.lm.sharding.shard`
            takes the main process' weights.
        learning: How it will learn.
        devices: This process and those that learn with it.
    """
    if devices.device.type == "cuda":
        # Attention inside documents without a mask of all pairs in memory.
        model.set_attn_implementation("flex_attention")
    if learning.checkpoint_activations:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if learning.compiled:
        for layer in model.base_model.layers:
            layer.compile()
    loss = LanguageModelLoss(model)
    if learning.sharded and devices.num_processes > 1:
        shard(loss, devices, learning.precision)
        return loss
    return loss.to(devices.device)


def continued(config: PretrainingConfig) -> PretrainingConfig:
    """A recipe for a model that goes on."""
    rate = config.learning.learning_rate * CONTINUED_RATE_SHARE
    share = config.general_share
    return replace(
        config,
        learning=replace(config.learning, learning_rate=rate),
        general_share=CONTINUED_GENERAL_SHARE if share is None else share,
    )


def token_weights(
    corpus: CorpusManifest, config: PretrainingConfig, shards: Mapping[str, TokenShard]
) -> dict[str, float]:
    """The mixture's shares, which are of bytes, as shares of tokens."""
    settings = corpus.mixture
    if config.general_share is not None:
        settings = settings.model_copy(update={"general_share": config.general_share})
    shares = mixture(corpus, settings)
    return {
        source: share * shards[source].num_tokens / max(1, int(shards[source].num_bytes.sum()))
        for source, share in shares.items()
    }


def run_fingerprint(
    config: PretrainingConfig,
    corpus: CorpusManifest,
    tokenizer: Any,
    base: Path | None,
    devices: Devices,
) -> str:
    """Of all that decides the weights."""
    identity = [
        *(asdict(config), corpus.fingerprint, corpus.mixture.model_dump(mode="json")),
        *(tokenizer_fingerprint(tokenizer), devices.device.type),
        None if base is None else model_fingerprint(base),
    ]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def open_run(
    folder: Path, fingerprint: str, devices: Devices
) -> AbstractContextManager[Checkpoint[LearningState]]:
    """Hold the folder of the unfinished run; processes that only learn with it hold nothing."""
    if not devices.is_main:
        return nullcontext(Checkpoint(checkpoint_folder(folder), fingerprint, LearningState))
    return open_checkpoint(
        folder, fingerprint, LearningState, what=f"model {folder.name!r}", error=EncoderError
    )
