"""Training rows per second of target attention, against FuxiCTR's DIN in the same run.

From the project's root: ``pip install fuxictr`` (into any environment that has this project's
packages; it is needed here only), then ``python -m benchmarks.bench_training``.

Compared are steps on batches that are ready in memory: forward, backward, clipping, optimiser, and
with ours the weights' moving average; one thread; histories of the same length, all full; the same
number of rows; the same widths of vectors, attention and head; no other features. ``ids``: vectors
learned per item, recipe ``din_ids``. ``texts``: frozen vectors of 384 numbers, projected to the
width, recipe ``din_text``; both gather them from one tensor within the step, which FuxiCTR leaves
to its loader, a slower one over pandas. FuxiCTR's model is its own class with its own
``train_step`` on a feature map made by hand, its attention with ReLU, as ours, not its default
Dice. Ours is measured with one row per history, the same work as FuxiCTR's, and with several that
share a history, as logs have them; FuxiCTR's has a history per row.
"""

import json
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from statistics import median
from typing import Any

import click
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.results_file import write_result
from encoders.schedule import warmup_cosine
from training.build import build_model, fit_inputs
from training.config import DinIdsConfig, DinTextConfig
from training.optimization import make_average, make_optimizer, set_learning_rates
from training.recipes import TrainingConfig
from training.schema import InputSchema

HIDDEN = (128, 64)
ATTENTION_HIDDEN = 32
DROPOUT = 0.1
AVERAGE_DECAY = 0.995
ID_WIDTH = 32
TEXT_WIDTH = 64
MEASURED_BEFORE = {"ids": 7_100, "ids_and_texts": 4_200}
"""Rows/s of FuxiCTR's DIN with all its data handling, one thread, as measured before this."""

Step = Callable[[], float]
"""Learns from its batch once; returns the loss."""


@dataclass(frozen=True)
class Sizes:
    """Of a batch and of what it refers to."""

    num_rows: int
    length: int
    """M, behaviours per history."""
    num_items: int
    vector_width: int


def our_step(sizes: Sizes, *, texts: bool, num_candidates: int) -> Step:
    """Our DIN: one step of the training loop on a ready batch.

    Args:
        sizes: Of the batch.
        texts: Text vectors instead of item ids.
        num_candidates: Rows that share a history; divides ``sizes.num_rows``.
    """
    torch.manual_seed(0)
    schema = InputSchema(
        scenes=("view",),
        sequence_length=sizes.length,
        vector_width=sizes.vector_width,
        user_dense_names=(),
        item_dense_names=(),
        context_names=(),
        evidence_names=(),
        category_vocabularies={},
    )
    shared: dict[str, Any] = {
        "attention_hidden": ATTENTION_HIDDEN,
        "hidden": HIDDEN,
        "dropout": DROPOUT,
    }
    model = build_model(
        DinTextConfig(output_width=TEXT_WIDTH, **shared)
        if texts
        else DinIdsConfig(id_width=ID_WIDTH, **shared),
        schema,
    )
    table = torch.randn(sizes.num_items + 1, sizes.vector_width)
    table[0] = 0
    contexts = sizes.num_rows // num_candidates
    history = torch.randint(1, sizes.num_items + 1, (contexts, 1, sizes.length))
    candidates = torch.randint(1, sizes.num_items + 1, (contexts, num_candidates))
    labels = torch.randint(0, 2, candidates.shape).float()
    empty = np.empty((1, 0), dtype=np.float32)
    fit_inputs(
        model,
        table.numpy(),
        (empty, empty, empty, empty),
        base_rate=0.5,
        item_keys=(np.arange(1, sizes.num_items + 1),),
    )
    inputs = (
        table,
        history,
        history.clone(),
        torch.ones(history.shape),
        torch.full((contexts, 1), float(sizes.length)),
        torch.zeros(contexts, 0),
        candidates,
        candidates.clone(),
        torch.zeros(*candidates.shape, 0),
        torch.zeros(*candidates.shape, 0, dtype=torch.int64),
        torch.zeros(*candidates.shape, 0),
        torch.zeros(*candidates.shape, 0),
    )
    config = TrainingConfig()
    optimizer, average = make_optimizer(model, config), make_average(model, AVERAGE_DECAY)
    model.train()

    def step() -> float:
        set_learning_rates(optimizer, warmup_cosine(0, num_steps=100, warmup_steps=10))
        loss = functional.binary_cross_entropy_with_logits(model(*inputs), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm, foreach=True)
        optimizer.step()
        average.update_parameters(model)
        return float(loss.detach())

    return step


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


def measure(
    steps: dict[str, Step], num_rows: int, *, num_rounds: int, steps_per_turn: int
) -> dict[str, list[float]]:
    """Let contenders take turns, after one that is not counted.

    Returns:
        Rows/s of each turn.
    """
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(num_rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            for _ in range(steps_per_turn):
                step()
            rate = num_rows * steps_per_turn / (time.perf_counter() - started)
            if turn:
                rates[name].append(rate)
        click.echo(f"turn {turn} of {num_rounds}", err=True)
    return rates


@click.command()
@click.option("--batch", type=click.IntRange(min=1), default=1024, show_default=True, help="Rows.")
@click.option("--length", type=click.IntRange(min=1), default=50, show_default=True)
@click.option("--items", type=click.IntRange(min=1), default=5000, show_default=True)
@click.option("--width", type=click.IntRange(min=1), default=384, show_default=True,
              help="Of the text vectors.")  # fmt: skip
@click.option("--candidates", type=click.IntRange(min=2), default=4, show_default=True,
              help="Rows that share a history, in the second of our measurements.")  # fmt: skip
@click.option("--rounds", "num_rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--steps-per-turn", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--ours-only", is_flag=True, help="Without FuxiCTR, where it is not installed.")
def main(
    batch: int,
    length: int,
    items: int,
    width: int,
    candidates: int,
    num_rounds: int,
    steps_per_turn: int,
    ours_only: bool,
) -> None:
    """Measure and write the result file."""
    torch.set_num_threads(1)
    if batch % candidates:
        raise click.UsageError(f"--batch {batch} must be a multiple of --candidates {candidates}")
    sizes = Sizes(batch, length, items, width)
    steps: dict[str, Step] = {}
    for kind in ("ids", "texts"):
        texts = kind == "texts"
        if not ours_only:
            steps[f"fuxictr_{kind}"] = fuxictr_step(sizes, texts=texts)
        for shared in (1, candidates):
            steps[f"ours_{kind}_{shared}"] = our_step(sizes, texts=texts, num_candidates=shared)
    rates = measure(steps, batch, num_rounds=num_rounds, steps_per_turn=steps_per_turn)
    ratios = {
        name.removeprefix("ours_"): {
            "median": median(turns := [a / b for a, b in zip(ours, theirs, strict=True)]),
            "lowest": min(turns),
            "highest": max(turns),
        }
        for name, ours in rates.items()
        if name.startswith("ours_")
        for theirs in [rates.get(f"fuxictr_{name.split('_')[1]}", [])]
        if theirs
    }
    result = write_result(
        "training",
        f"python -m benchmarks.bench_training --batch {batch} --length {length} --items {items} "
        f"--width {width} --candidates {candidates} --rounds {num_rounds} "
        f"--steps-per-turn {steps_per_turn}" + (" --ours-only" if ours_only else ""),
        {
            "batch": batch,
            "length": length,
            "items": items,
            "vector_width": width,
            "id_width": ID_WIDTH,
            "text_width": TEXT_WIDTH,
            "threads": 1,
            "load_average_1min": os.getloadavg()[0],
            "rows_per_s": {name: median(values) for name, values in rates.items()},
            "ours_to_fuxictr": ratios,
            "measured_before": MEASURED_BEFORE,
            "rows_per_s_of_turns": rates,
        },
    )
    click.echo(json.dumps({"result": str(result), "ours_to_fuxictr": ratios}))


if __name__ == "__main__":
    main()
