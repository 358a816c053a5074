"""What a pretraining needs before its first step: identity, state, mixture, the model in place."""

import hashlib
import json
from collections.abc import Collection, Mapping
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
from encoders.lm.model_folder import PRETRAINING_FILE
from encoders.lm.pretraining_manifest import PretrainingManifest
from encoders.lm.recipes import CONTINUED_RATE_SHARE, LearningConfig, PretrainingConfig
from encoders.lm.sharding import shard
from encoders.lm.shards import COMMAND, TokenShard, tokenizer_fingerprint
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


def original_pretraining(base: Path) -> PretrainingManifest | None:
    """How a model was pretrained; None where its folder does not tell.

    Raises:
        StoreError: If it was written by another version.
    """
    path = base / PRETRAINING_FILE
    return PretrainingManifest.load(path, made_by=COMMAND) if path.exists() else None


def continued(
    config: PretrainingConfig, base: Path, explicit: Collection[str] = ()
) -> PretrainingConfig:
    """A recipe for a model that goes on.

    Its learning rate is :data:`encoders.lm.recipes.CONTINUED_RATE_SHARE` of the original's, its
    optimiser and length of rows are the original's. Where the model's folder does not tell these,
    the recipe stands for the original. Half of the mixture is general text where the recipe says
    nothing else.

    Args:
        config: The recipe.
        base: Folder of the model.
        explicit: Settings of ``config.learning`` that stay as they are.

    Raises:
        EncoderError: If the original's optimiser does not fit the recipe.
        StoreError: If the model was pretrained by another version.
    """
    original = original_pretraining(base)
    learning, shape, share = config.learning, config.shape, config.general_share
    changes: dict[str, Any] = {"learning_rate": learning.learning_rate * CONTINUED_RATE_SHARE}
    if original is not None:
        changes["learning_rate"] = _continued_rate(original)
        changes["optimizer"] = original.config["learning"]["optimizer"]
        shape = replace(shape, sequence_length=original.config["shape"]["sequence_length"])
    kept = {name: value for name, value in changes.items() if name not in explicit}
    return replace(
        config,
        shape=shape,
        learning=replace(learning, **kept),
        general_share=CONTINUED_GENERAL_SHARE if share is None else share,
    )


def _continued_rate(original: PretrainingManifest) -> float:
    """Of a model's next pretraining; one that went on itself has the reduced rate already."""
    rate = float(original.config["learning"]["learning_rate"])
    return rate * CONTINUED_RATE_SHARE if original.base_model is None else rate


def trained_shape(config: Any, sequence_length: int) -> dict[str, object]:
    """What :class:`encoders.lm.recipes.ModelShape` says, of a model of any architecture.

    Args:
        config: The model's, of transformers.
        sequence_length: Tokens of the rows that it learned from.

    Returns:
        By :class:`encoders.lm.recipes.ModelShape`'s names; None where there is no such thing.
    """
    theirs = {
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_key_value_heads": "num_key_value_heads",
        "tied": "tie_word_embeddings",
    }
    shape = {ours: getattr(config, name, None) for ours, name in theirs.items()}
    rope = getattr(config, "rope_parameters", None) or {}
    return {**shape, "sequence_length": sequence_length, "rope_theta": rope.get("rope_theta")}


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
