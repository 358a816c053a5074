"""From a config to a model, and from training data to the buffers that it reads its inputs with."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import nn

from encoders.pretrained import load_whole_model
from encoders.table import table_encoder
from training.baselines import (
    Dcn,
    DinIds,
    DinText,
    ItemOnly,
    MeanPooling,
    Popularity,
    RepeatCount,
)
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
from training.full_text import FullText
from training.inputs import DenseInputs
from training.item_ids import ItemEmbedding
from training.layers import MemberPerceptron, Perceptron, TableSpace
from training.model import Bahe
from training.program_inputs import ClickModel
from training.schema import InputSchema
from training.text_tokens import BehaviorTokens, TextTokens, behavior_tokens
from training.trees import Ensemble, Trees

if TYPE_CHECKING:  # only named here: the feature store behind it is slow to import
    from training.sources import Sources


def pretrained_layers(config: ModelConfig, sources: "Sources") -> nn.Module | None:
    """The language model's layers that the model of this config trains on: some, all or none."""
    match config:
        case BaheConfig(use_deep_half=True):
            return sources.deep_half(config.num_deep_layers)
        case EnsembleConfig():
            return pretrained_layers(config.bahe, sources)
        case FullTextConfig():
            encoder = table_encoder(sources.home, sources.table.fingerprint)
            return load_whole_model(encoder.model)  # type: ignore[no-any-return]
        case _:
            return None


def texts_to_read(config: ModelConfig, sources: "Sources") -> BehaviorTokens | None:
    """The tokens of the table's texts, where the model of this config reads them."""
    if not isinstance(config, FullTextConfig):
        return None
    encoder = table_encoder(sources.home, sources.table.fingerprint)
    return behavior_tokens(
        sources.home,
        sources.table.ids,
        model=encoder.model,
        max_tokens=config.max_tokens_per_behavior,
    )


def build_model(
    config: ModelConfig, schema: InputSchema, deep_half: nn.Module | None = None
) -> ClickModel:
    """The model of ``config`` with fresh weights, except the pretrained layers'.

    Args:
        config: Which model, and how it is built.
        schema: What it reads.
        deep_half: Of :func:`pretrained_layers`.
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
        case DinIdsConfig():
            return DinIds(config, schema)
        case DcnConfig():
            return Dcn(config, schema)
        case FullTextConfig():
            assert deep_half is not None
            return FullText(config, schema, deep_half)
        case ItemOnlyConfig():
            return ItemOnly(config, schema)
        case TreesConfig():
            return Trees(config, schema)
        case EnsembleConfig():
            return Ensemble(Bahe(config.bahe, schema, deep_half), Trees(config.trees, schema))


def fit_inputs(
    model: nn.Module,
    vectors: NDArray[np.float32],
    dense: Sequence[NDArray[np.float32]],
    *,
    base_rate: float,
    item_keys: Sequence[NDArray[np.int64]] = (),
    behaviors: BehaviorTokens | None = None,
) -> None:
    """Take the buffers from training data: table statistics, bins, the base rate, item ids.

    Args:
        model: Of :func:`build_model`.
        vectors: float32 [V, D], row 0 = no text.
        dense: Training rows of user, item and context features and evidence, float32 [R, F] each.
        base_rate: Share of clicked training rows, in ``(0, 1)``.
        item_keys: Keys of the training rows' candidates and histories, int64 of any shape; the
            vocabulary of models that learn a vector per item.
        behaviors: The table's texts, for models that read them; see :func:`texts_to_read`.

    Raises:
        ValueError: If the model learns a vector per item, and no item keys are given, or reads
            texts, and none are given.
    """
    for module in model.modules():
        match module:
            case TableSpace():
                module.set_statistics(vectors)
            case DenseInputs():
                module.set_edges(dense)
            case Perceptron() | MemberPerceptron():
                module.set_base_rate(base_rate)
            case ItemEmbedding():
                if not item_keys:
                    raise ValueError("this model learns a vector per item: give item_keys")
                module.set_vocabulary(item_keys)
            case TextTokens():
                if behaviors is None:
                    raise ValueError("this model reads texts: give behaviors")
                module.set_tokens(vectors, behaviors)
            case _:
                pass
