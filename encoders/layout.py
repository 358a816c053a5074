"""How transformers lays out models that are one stack of layers, and how a stack is cut."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from feature_repo.errors import EncoderError

_STACKS = (("encoder", "layer"), ("transformer", "layer"), ("", "layers"))
"""Where layers lie: BERT, RoBERTa, ELECTRA, MPNet; DistilBERT; Llama, Mistral, Qwen, ModernBERT."""
_FINAL_NORMS = ("norm", "final_norm")
"""Names of the norm after the last layer in models of the third kind."""


def layer_stack(model: PreTrainedModel) -> nn.ModuleList:
    """Find the layers, lowest first.

    Raises:
        EncoderError: If the model is laid out in none of the known ways.
    """
    for holder_name, name in _STACKS:
        holder = getattr(model, holder_name, None) if holder_name else model
        layers = getattr(holder, name, None)
        if isinstance(layers, nn.ModuleList) and len(layers):
            return layers
    raise EncoderError(_unknown_layout(model))


def final_norm_name(model: PreTrainedModel) -> str | None:
    """Name the norm after the last layer; None for BERT's family, which has none.

    Raises:
        EncoderError: If there should be one and it goes by an unknown name.
    """
    if not hasattr(model, "layers"):
        return None
    for name in _FINAL_NORMS:
        if isinstance(getattr(model, name, None), nn.Module):
            return name
    raise EncoderError(_unknown_layout(model))


def keep_layers(model: PreTrainedModel, start: int, stop: int) -> None:
    """Keep the layers ``start <= index < stop``, in place, and tell the model's configuration.

    The pooler, a head above all layers, goes; keys and values are not cached.
    """
    layers, config = layer_stack(model), model.config
    types = getattr(config, "layer_types", None)
    del layers[stop:]
    del layers[:start]
    config.num_hidden_layers = len(layers)
    config.use_cache = False
    if types is not None:  # which layers attend in a sliding window
        config.layer_types = list(types[start:stop])
    for index, layer in enumerate(layers):
        modules: Iterable[Any] = layer.modules()
        for module in modules:
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    if hasattr(model, "pooler"):
        model.pooler = None


def _unknown_layout(model: PreTrainedModel) -> str:
    known = ", ".join(".".join(filter(None, stack)) for stack in _STACKS)
    return (
        f"cannot split a {type(model).__name__}: expected its layers under one of {known} (BERT, "
        "DistilBERT and Llama families), and in the last case a norm after them called "
        + " or ".join(_FINAL_NORMS)
    )
