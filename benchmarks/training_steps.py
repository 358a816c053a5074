"""Training steps on batches that are ready in memory: our models', eager or compiled, FuxiCTR's.

Ours is what the training loop does in one: forward, backward, clipping, optimiser, the weights'
moving average, and with BAHE the auxiliary loss.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel

from encoders.evidence import evidence_names
from encoders.schedule import warmup_cosine
from encoders.split import DeepHalf
from training.build import build_model, fit_inputs
from training.config import BaheConfig, DinIdsConfig, DinTextConfig, ModelConfig
from training.optimization import make_average, make_optimizer, set_learning_rates
from training.recipes import RECIPES, TrainingConfig
from training.schema import InputSchema

HIDDEN = (128, 64)
ATTENTION_HIDDEN = 32
DROPOUT = 0.1
AVERAGE_DECAY = 0.995
ID_WIDTH = 32
TEXT_WIDTH = 64
DENSE_FEATURES = 20
"""Of the user, and as many of the item, where a model reads them; Online Retail II has 40."""
_SCENE = "view"
_NUM_HEADS = 12
"""MiniLM's, of its layers' attention."""
_INNER_FACTOR = 4
"""MiniLM's, width of its layers' perceptrons over their own."""

OURS: dict[str, ModelConfig] = {
    "ids": DinIdsConfig(
        id_width=ID_WIDTH, attention_hidden=ATTENTION_HIDDEN, hidden=HIDDEN, dropout=DROPOUT
    ),
    "texts": DinTextConfig(
        output_width=TEXT_WIDTH, attention_hidden=ATTENTION_HIDDEN, hidden=HIDDEN, dropout=DROPOUT
    ),
    "bahe_base": RECIPES["bahe_base"]().model,
    "bahe_fast": RECIPES["bahe_fast"]().model,
}
"""Our models by name: DIN in FuxiCTR's sizes, and recipes of BAHE as they are."""

Step = Callable[[], float]
"""Learns from its batch once; returns the loss of the clicks."""


@dataclass(frozen=True)
class Sizes:
    """Of a batch and of what it refers to."""

    num_rows: int
    length: int
    """M, behaviours per history."""
    num_items: int
    vector_width: int


def our_step(
    sizes: Sizes, model_config: ModelConfig, *, num_candidates: int, compiled: bool = False
) -> Step:
    """One step of the training loop on a ready batch.

    Args:
        sizes: Of the batch.
        model_config: What learns, one of :data:`OURS`.
        num_candidates: Rows that share a history; divides ``sizes.num_rows``.
        compiled: As ``longtrail train --compile`` does it; the first step then compiles.
    """
    torch.manual_seed(0)
    contexts = sizes.num_rows // num_candidates
    schema = _schema(sizes, model_config)
    model = build_model(model_config, schema, _deep_half(model_config, sizes.vector_width))
    table = torch.randn(sizes.num_items + 1, sizes.vector_width)
    table[0] = 0
    history = torch.randint(1, sizes.num_items + 1, (contexts, 1, sizes.length))
    candidates = torch.randint(1, sizes.num_items + 1, (contexts, num_candidates))
    labels = torch.randint(0, 2, candidates.shape).float()
    user_dense = torch.randn(contexts, len(schema.user_dense_names))
    item_dense = torch.randn(*candidates.shape, len(schema.item_dense_names))
    evidence = torch.randn(*candidates.shape, len(schema.evidence_names))
    numbers = (user_dense, item_dense, torch.zeros(*candidates.shape, 0), evidence)
    fit_inputs(
        model,
        table.numpy(),
        [values.flatten(0, -2).numpy() for values in numbers],
        base_rate=0.5,
        item_keys=(np.arange(1, sizes.num_items + 1),),
    )
    hours = torch.arange(sizes.length, 0, -1).float() * 3600
    inputs = (
        table,
        history,
        history.clone(),
        hours.expand(history.shape).contiguous(),
        torch.full((contexts, 1), float(sizes.length)),
        user_dense,
        candidates,
        candidates.clone(),
        item_dense,
        torch.zeros(*candidates.shape, 0, dtype=torch.int64),
        torch.zeros(*candidates.shape, 0),
        evidence,
    )
    config = TrainingConfig()
    optimizer, average = make_optimizer(model, config), make_average(model, AVERAGE_DECAY)
    forward: Callable[..., Tensor] = torch.compile(model, dynamic=True) if compiled else model
    model.train()

    def step() -> float:
        set_learning_rates(optimizer, warmup_cosine(0, num_steps=100, warmup_steps=10))
        logits = forward(*inputs).reshape(*labels.shape, -1)
        wanted = labels.unsqueeze(-1).expand_as(logits)  # of every member, where there are
        loss = functional.binary_cross_entropy_with_logits(logits, wanted)
        auxiliary = model.auxiliary_loss(labels.flatten())
        learned = loss if auxiliary is None else loss + auxiliary
        optimizer.zero_grad(set_to_none=True)
        learned.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm, foreach=True)
        optimizer.step()
        average.update_parameters(model)
        return float(loss.detach())

    return step


def _schema(sizes: Sizes, model_config: ModelConfig) -> InputSchema:
    """One scene; BAHE reads numbers, the others none."""
    reads_numbers = isinstance(model_config, BaheConfig)
    names = [str(number) for number in range(DENSE_FEATURES if reads_numbers else 0)]
    return InputSchema(
        scenes=(_SCENE,),
        sequence_length=sizes.length,
        vector_width=sizes.vector_width,
        user_dense_names=tuple(f"user_{name}" for name in names),
        item_dense_names=tuple(f"item_{name}" for name in names),
        context_names=(),
        evidence_names=evidence_names((_SCENE,)) if reads_numbers else (),
        category_vocabularies={},
    )


def _deep_half(model_config: ModelConfig, width: int) -> nn.Module | None:
    """Layers of MiniLM's shape with random weights, where the model has a deep half."""
    if not isinstance(model_config, BaheConfig) or not model_config.use_deep_half:
        return None
    config = BertConfig(
        hidden_size=width,
        intermediate_size=_INNER_FACTOR * width,
        num_hidden_layers=1 + (model_config.num_deep_layers or 3),  # the lowest goes at once
        num_attention_heads=_NUM_HEADS,
        vocab_size=2,
    )
    return DeepHalf(BertModel(config, add_pooling_layer=False), 1)


def fuxictr_step(sizes: Sizes, *, texts: bool) -> Step:
    """FuxiCTR's DIN: its ``train_step`` on a ready batch, one history per row.

    Raises:
        ClickException: If FuxiCTR is not installed.
    """
    try:
        features = import_module("fuxictr.features").FeatureMap("made_by_hand", ".")
        din = import_module("model_zoo.LongCTR.DIN.DIN").DIN
    except ImportError as error:
        raise click.ClickException(
            f"FuxiCTR cannot be imported ({error}): run `pip install fuxictr`, or pass --ours-only"
        ) from error
    torch.manual_seed(0)
    width = TEXT_WIDTH if texts else ID_WIDTH
    kind = (
        {"type": "embedding", "pretrain_dim": sizes.vector_width}
        if texts
        else {"type": "categorical", "vocab_size": sizes.num_items + 1, "padding_idx": 0}
    )
    features.features = OrderedDict(item={"source": "item", **kind})
    features.labels, features.default_emb_dim = ["label"], width
    model = din(
        features,
        embedding_dim=width,
        dnn_hidden_units=list(HIDDEN),
        attention_hidden_units=[ATTENTION_HIDDEN],
        attention_hidden_activations="ReLU",
        net_dropout=DROPOUT,
        optimizer="adam",
        loss="binary_crossentropy",
        metrics=["AUC"],
        verbose=0,
        model_root=".",
    )
    model._max_gradient_norm, model._batch_index = 10.0, 0  # what its fit sets
    rows = torch.randint(1, sizes.num_items + 1, (sizes.num_rows * (sizes.length + 1),))
    table = torch.randn(sizes.num_items + 1, sizes.vector_width)
    mask = torch.ones(sizes.num_rows, sizes.length)
    labels = {"label": torch.randint(0, 2, (sizes.num_rows,)).float()}
    model.train()

    def step() -> float:
        loss = model.train_step((labels, {"item": table[rows] if texts else rows}, mask))
        return float(loss.detach())

    return step
