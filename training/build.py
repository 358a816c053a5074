"""From a config to a model, and from training data to the buffers that it reads its inputs with."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from training.baselines import DinText, ItemOnly, MeanPooling, Popularity, RepeatCount
from training.config import (
    BaheConfig,
    DinTextConfig,
    ItemOnlyConfig,
    MeanPoolingConfig,
    ModelConfig,
    PopularityConfig,
    RepeatCountConfig,
)
from training.inputs import DenseInputs
from training.layers import Perceptron, TableSpace
from training.model import Bahe
from training.schema import InputSchema


def needs_deep_half(config: ModelConfig) -> bool:
    """Whether the model of this config holds a language model's upper layers."""
    return isinstance(config, BaheConfig) and config.use_deep_half


def build_model(
    config: ModelConfig, schema: InputSchema, deep_half: nn.Module | None = None
) -> nn.Module:
    """The model of ``config`` with fresh weights, except the deep half's.

    Args:
        config: Which model, and how it is built.
        schema: What it reads.
        deep_half: Where :func:`needs_deep_half`; see :class:`training.model.Bahe`.
    """
    match config:
        case BaheConfig():
            return Bahe(config, schema, deep_half)
        case PopularityConfig():
            return Popularity(config, schema)
        case RepeatCountConfig():
            return RepeatCount(config, schema)
        case MeanPoolingConfig():
            return MeanPooling(config, schema)
        case DinTextConfig():
            return DinText(config, schema)
        case ItemOnlyConfig():
            return ItemOnly(config, schema)


def fit_inputs(
    model: nn.Module,
    vectors: NDArray[np.float32],
    dense: Sequence[NDArray[np.float32]],
    *,
    base_rate: float,
) -> None:
    """Take the buffers from training data: table statistics, numeric bins, the base rate.

    Args:
        model: Of :func:`build_model`.
        vectors: float32 [V, D], row 0 = no text.
        dense: Training rows of user, item and context features, float32 [R, F] each.
        base_rate: Share of clicked training rows, in ``(0, 1)``.
    """
    for module in model.modules():
        match module:
            case TableSpace():
                module.set_statistics(vectors)
            case DenseInputs():
                module.set_edges(dense)
            case Perceptron():
                module.set_base_rate(base_rate)
            case _:
                pass
