"""The training loop: steps, validations, the best weights, checkpoints.

The order of the data is a function of (seed, epoch), and what a step draws at random (dropout) of
(seed, step): the number of steps done is all that a killed run must know to go on, beside the
tensors, and it ends with the bits it would have had.

Several processes share every pass over a batch, so that a step sees the same rows whatever their
number. Sums are then rounded in another order, dropout hits other rows, and BAHE's auxiliary loss
sees the items of a process' share alone; without these two the loss is the same up to rounding.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from encoders.checkpoint import (
    optimizer_tensors,
    restore_optimizer,
    with_prefix,
    without_prefix,
)
from encoders.devices import Devices
from encoders.schedule import warmup_cosine
from encoders.tracking import Meter, NoTracker, Tracker
from feature_repo.errors import DataSetError
from feature_repo.progress import Progress
from training.batches import count_batches, make_batch, plan_batches, split_batch
from training.checkpoint import RunCheckpoint, RunState
from training.dataset import ClickData
from training.metrics import auc, logloss
from training.optimization import make_average, make_optimizer, set_learning_rates
from training.program_inputs import ClickModel
from training.recipes import TrainingConfig
from training.scoring import probabilities, score

logger = logging.getLogger(__name__)

_EPOCH_SEEDS = 1_000_003
"""Prime: seeds of (run seed, epoch) do not meet for fewer epochs than that."""
TRACK_EVERY_STEPS = 20
"""Steps between two points of the training curves."""


@dataclass(frozen=True)
class LoopResult:
    """What a loop tells when it is done."""

    history: list[dict[str, Any]]
    """One entry per validation: epoch, step, loss since the one before, valid AUC and logloss."""
    rows_per_s: float | None
    """Rows learned from per second of this process' steps, all processes together, without
    validations and checkpoints; None where nothing was left to learn."""


@dataclass
class TrainingLoop:
    """Fits a model in place, on its device.

    Args:
        model: With its input buffers set, on ``devices.device``.
        table: float32 [V, D], on ``devices.device``.
        train: Rows to learn from.
        valid: Rows on which the best weights are chosen, by AUC.
        config: How.
        checkpoint: Where the state goes, every ``checkpoint_every_steps`` and at validations.
        progress: Told rows and loss.
        devices: This process and those that train the same model with it.
        tracker: Told the curves.
    """

    model: ClickModel
    table: Tensor
    train: ClickData
    valid: ClickData
    config: TrainingConfig
    checkpoint: RunCheckpoint
    progress: Progress
    devices: Devices = field(default_factory=Devices)
    tracker: Tracker = field(default_factory=NoTracker)

    def __post_init__(self) -> None:
        config = self.config
        self._optimizer = make_optimizer(self.model, config)
        decay = config.average_decay
        self._average = None if decay is None else make_average(self.model, decay)
        # Batches differ in every size: one program for all of them instead of one for each.
        self._forward: Callable[..., Tensor] = (
            torch.compile(self.model, dynamic=True) if config.compiled else self.model
        )
        self._step_contexts = config.batch_contexts * config.accumulate_batches
        self._steps_per_epoch = count_batches(
            self.train, batch_contexts=self._step_contexts, max_candidates=config.max_candidates
        )
        self._state = RunState(
            fingerprint=self.checkpoint.fingerprint,
            tensors="",
            step=0,
            num_rows=0,
            loss_sum=0.0,
            best_auc=None,
            validations_since_best=0,
            history=[],
        )
        self._best: dict[str, Tensor] = {}
        self._meter = Meter()

    def run(self) -> LoopResult:
        """Train, going on from the checkpoint where there is one, and keep the best weights."""
        self._restore()
        first_epoch = self._state.step // self._steps_per_epoch
        for epoch in range(first_epoch, self.config.epochs):
            if self._out_of_patience():
                break
            self._epoch(epoch)
        if self._best:
            self.model.load_state_dict(self._best)
        self.model.eval()
        return LoopResult(self._state.history, self._meter.rows_per_s)

    def _out_of_patience(self) -> bool:
        patience = self.config.patience
        return patience is not None and self._state.validations_since_best >= patience

    def _epoch(self, epoch: int) -> None:
        """The rest of an epoch, from the step that comes next."""
        total = self.config.epochs * len(self.train)
        plan = plan_batches(
            self.train,
            batch_contexts=self._step_contexts,
            max_candidates=self.config.max_candidates,
            seed=self.config.seed * _EPOCH_SEEDS + epoch,
        )
        parts = self.config.validations_per_epoch
        validate_after = {len(plan) * (part + 1) // parts for part in range(parts)}
        first = self._state.step - epoch * len(plan)
        done = epoch * len(self.train) + sum(_num_rows(pieces) for pieces in plan[:first])
        if self._meter.rows == 0 and done:
            self.progress(done, total)  # by the process that was killed
        for place, pieces in enumerate(plan[first:], start=first + 1):
            self._learn(pieces, total)
            validate = place in validate_after
            if validate:
                self._validate(epoch)
            if validate or self._state.step % self.config.checkpoint_every_steps == 0:
                self._save()
            if self._out_of_patience():
                logger.info("no better validation in %s: stop", self.config.patience)
                break

    def _learn(self, pieces: NDArray[np.int64], total: int) -> None:
        """One step of the optimiser, and the news of it."""
        started = time.perf_counter()
        step, num_rows = self._state.step, _num_rows(pieces)
        factor = warmup_cosine(
            step,
            num_steps=self.config.epochs * self._steps_per_epoch,
            warmup_steps=self.config.warmup_steps,
        )
        loss = self._step(pieces, num_rows, factor)
        self._state = self._state.model_copy(
            update={
                "step": step + 1,
                "num_rows": self._state.num_rows + num_rows,
                "loss_sum": self._state.loss_sum + loss * num_rows,
            }
        )
        self._meter.add(num_rows, loss, time.perf_counter() - started)
        self.progress(num_rows, total, loss=loss)
        if (step + 1) % TRACK_EVERY_STEPS == 0:
            rate = self.config.learning_rate * factor
            self.tracker.figures(step + 1, {**self._meter.take(), "train/learning_rate": rate})

    def _step(self, pieces: NDArray[np.int64], num_rows: int, factor: float) -> float:
        """Mean loss over the rows, the same in every process."""
        self.model.train()
        set_learning_rates(self._optimizer, factor)
        self._optimizer.zero_grad(set_to_none=True)
        device = self.devices.device
        loss = torch.zeros((), device=device)
        passes = split_batch(
            pieces,
            self.config.batch_contexts,
            num_processes=self.devices.num_processes,
            process_index=self.devices.process_index,
        )
        for index, (share, share_weight) in enumerate(passes):
            batch = make_batch(self.train, share, truncate=True).to(device)
            self.devices.seed(self.config.seed, self._state.step, index)
            logits = self._forward(self.table, *batch.inputs)
            found, labels = logits[batch.mask], batch.labels[batch.mask]
            weight = share_weight
            if found.dim() == 2:  # several members: each learns as if it were alone
                weight /= found.shape[1]
                labels = labels.unsqueeze(1).expand_as(found)
            losses = functional.binary_cross_entropy_with_logits(found, labels, reduction="sum")
            part = losses * (weight / num_rows)
            auxiliary = self.model.auxiliary_loss(batch.labels[batch.mask])
            learned = part
            if auxiliary is not None:
                learned = part + auxiliary * share_weight * len(found) / num_rows
            learned.backward()  # type: ignore[no-untyped-call]
            loss += part.detach()
        loss = self.devices.reduce_gradients(self.model, loss)
        value = float(loss)
        if not np.isfinite(value):
            raise DataSetError(
                f"the loss became {value}: lower --learning-rate, or look for impossible "
                "values in the features with `longtrail status`"
            )
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm, foreach=True)
        self._optimizer.step()
        if self._average is not None:
            self._average.update_parameters(self.model)
        return value

    def _validate(self, epoch: int) -> None:
        """Measure the weights that would be kept now, and keep them if they are the best."""
        kept = self.model if self._average is None else self._average.module
        chances = probabilities(
            score(kept.eval(), self.table, self.valid, truncate=True, devices=self.devices)
        )
        state = self._state
        value = auc(self.valid.clicked, chances)
        entry = {
            "epoch": epoch + 1,
            "step": state.step,
            "train_loss": state.loss_sum / state.num_rows,
            "valid_auc": value,
            "valid_logloss": logloss(self.valid.clicked, chances),
        }
        logger.info("validation %s", entry)
        figures = {"valid/auc": value, "valid/logloss": entry["valid_logloss"]}
        self.tracker.figures(state.step, figures)
        # Without an AUC (one class only) the last weights are as good as any.
        better = value is None or state.best_auc is None or value > state.best_auc
        if better:
            self._best = {name: t.detach().clone() for name, t in kept.state_dict().items()}
        self._state = state.model_copy(
            update={
                "num_rows": 0,
                "loss_sum": 0.0,
                "best_auc": value if better else state.best_auc,
                "validations_since_best": 0 if better else state.validations_since_best + 1,
                "history": [*state.history, entry],
            }
        )

    def _save(self) -> None:
        if not self.devices.is_main:
            return
        tensors = with_prefix("model", self.model.state_dict())
        tensors |= with_prefix("best", self._best)
        tensors |= optimizer_tensors(self.model, self._optimizer)
        if self._average is not None:
            tensors |= with_prefix("average", self._average.state_dict())
        name = f"state-{self._state.step}.safetensors"
        self.checkpoint.save(self._state.model_copy(update={"tensors": name}), tensors)

    def _restore(self) -> None:
        """Take the last checkpoint's state, where there is one."""
        saved = self.checkpoint.load()
        if saved is not None:
            self._state, tensors = saved
            self.model.load_state_dict(without_prefix("model", tensors))
            restore_optimizer(self.model, self._optimizer, tensors)
            if self._average is not None:
                self._average.load_state_dict(without_prefix("average", tensors))
            self._best = without_prefix("best", tensors)
        self.devices.wait()  # before the main process replaces what the others read


def _num_rows(pieces: NDArray[np.int64]) -> int:
    return int((pieces[:, 2] - pieces[:, 1]).sum())
