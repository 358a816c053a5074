"""What an artifact's folder says of its recipe, and the eager model with its weights.

The folder's form is :mod:`feature_repo.artifact`; its programs are opened by
:mod:`encoders.loaded_artifact`.
"""

import importlib.metadata
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from torch import nn

from feature_repo.artifact import WEIGHTS_FILE, ArtifactManifest
from feature_repo.errors import ArtifactError
from training.build import build_model, pretrained_layers
from training.config import (
    BaheConfig,
    DcnConfig,
    DinIdsConfig,
    DinTextConfig,
    EnsembleConfig,
    FullTextConfig,
    ItemOnlyConfig,
    MeanPoolingConfig,
    ModelConfig,
    PopularityConfig,
    RepeatCountConfig,
    TreesConfig,
)
from training.recipes import Recipe
from training.schema import InputSchema
from training.sources import Sources

_CONFIGS: dict[str, type[ModelConfig]] = {
    kind.__name__: kind
    for kind in (
        BaheConfig,
        PopularityConfig,
        RepeatCountConfig,
        MeanPoolingConfig,
        DinTextConfig,
        DinIdsConfig,
        DcnConfig,
        FullTextConfig,
        ItemOnlyConfig,
        TreesConfig,
        EnsembleConfig,
    )
}


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON; ``model.kind`` names the class of its config."""
    values = asdict(recipe)
    values["model"]["kind"] = type(recipe.model).__name__
    return values


def model_config(manifest: ArtifactManifest) -> ModelConfig:
    """The config of an artifact's model.

    Raises:
        ArtifactError: If this version does not know it.
    """
    values = dict(manifest.config["model"])
    kind = values.pop("kind", None)
    if kind not in _CONFIGS:
        raise ArtifactError(
            f"run {manifest.run!r} holds a model of kind {kind!r}, which this version does not "
            f"know (it knows {', '.join(sorted(_CONFIGS))}): train it again"
        )
    try:
        config: ModelConfig = TypeAdapter(_CONFIGS[kind]).validate_python(values)
    except ValidationError as error:
        raise ArtifactError(
            f"the config of run {manifest.run!r} is not one of this version "
            f"({error.errors()[0]['msg']}): train it again"
        ) from error
    return config


def load_model(sources: Sources, manifest: ArtifactManifest) -> nn.Module:
    """The eager model of a run with its weights, in evaluation mode.

    Raises:
        ArtifactError: If the weights do not fit the model.
    """
    config = model_config(manifest)
    layers = pretrained_layers(config, sources)
    model = build_model(config, InputSchema.of(manifest), layers)
    path = sources.home.runs / manifest.run / WEIGHTS_FILE
    try:
        model.load_state_dict(load_file(path))
    except (FileNotFoundError, RuntimeError) as error:
        raise ArtifactError(
            f"{path} does not hold the weights of this model: train it again"
        ) from error
    return model.eval()


def save_weights(model: nn.Module, path: Path) -> None:
    """Write all weights and buffers."""
    state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    save_file(state, path)


def versions() -> dict[str, str]:
    """Of what the figures may depend on."""
    names = ("feast", "numpy", "safetensors", "scikit-learn", "transformers")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in names},
    }
