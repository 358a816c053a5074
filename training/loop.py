"""The training loop: steps, validation, the best weights, a checkpoint after every epoch.

The order of the data and the dropout of an epoch depend on (seed, epoch) alone: a run that was
killed and goes on ends with the weights it would have had.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from feature_repo.errors import DataSetError
from feature_repo.progress import Progress
from training.batches import Batch, iterate, plan_batches
from training.checkpoint import (
    Checkpoint,
    CheckpointState,
    optimizer_tensors,
    restore_optimizer,
    with_prefix,
    without_prefix,
)
from training.dataset import ClickData
from training.metrics import auc, logloss
from training.optimization import make_average, make_optimizer, schedule, set_learning_rates
from training.recipes import TrainingConfig
from training.scoring import probabilities, score

logger = logging.getLogger(__name__)

_EPOCH_SEEDS = 1_000_003
"""Prime: seeds of (run seed, epoch) do not meet for fewer epochs than that."""


@dataclass
class TrainingLoop:
    """Fits a model in place.

    Args:
        model: With its input buffers set.
        table: float32 [V, D].
        train: Rows to learn from.
        valid: Rows on which the best weights are chosen, by AUC.
        config: How.
        checkpoint: Where the state goes after each epoch.
        progress: Told rows and loss.
    """

    model: nn.Module
    table: Tensor
    train: ClickData
    valid: ClickData
    config: TrainingConfig
    checkpoint: Checkpoint
    progress: Progress

    def __post_init__(self) -> None:
        self._optimizer = make_optimizer(self.model, self.config)
        decay = self.config.average_decay
        self._average = None if decay is None else make_average(self.model, decay)
        self._best: dict[str, Tensor] = {}
        self._best_auc: float | None = None
        self._history: list[dict[str, Any]] = []

    def run(self) -> list[dict[str, Any]]:
        """Train, going on from the checkpoint where there is one, and keep the best weights.

        Returns:
            One entry per validation: epoch, step, loss since the one before, valid AUC and logloss.
        """
        first_epoch = self._restore()
        total = self.config.epochs * len(self.train)
        if first_epoch:
            self.progress(first_epoch * len(self.train), total)
        for epoch in range(first_epoch, self.config.epochs):
            self._epoch(epoch, total)
            self._save(epoch + 1)
        if self._best:
            self.model.load_state_dict(self._best)
        self.model.eval()
        return self._history

    def _epoch(self, epoch: int, total: int) -> None:
        seed = self.config.seed * _EPOCH_SEEDS + epoch
        torch.manual_seed(seed)
        plan = plan_batches(
            self.train,
            batch_contexts=self.config.batch_contexts,
            max_candidates=self.config.max_candidates,
            seed=seed,
        )
        parts = self.config.validations_per_epoch
        validate_after = {len(plan) * (part + 1) // parts for part in range(parts)}
        self.model.train()
        loss_sum, num_rows = 0.0, 0
        for index, batch in enumerate(iterate(self.train, plan, truncate=True)):
            step = epoch * len(plan) + index
            factor = schedule(
                step,
                num_steps=self.config.epochs * len(plan),
                warmup_steps=self.config.warmup_steps,
            )
            loss = self._step(batch, factor)
            loss_sum += loss * len(batch.rows)
            num_rows += len(batch.rows)
            self.progress(len(batch.rows), total, loss=loss)
            if index + 1 in validate_after:
                self._validate(epoch, step + 1, loss_sum / num_rows)
                loss_sum, num_rows = 0.0, 0
                self.model.train()

    def _step(self, batch: Batch, factor: float) -> float:
        set_learning_rates(self._optimizer, factor)
        logits = self.model(self.table, *batch.inputs)
        loss = functional.binary_cross_entropy_with_logits(
            logits[batch.mask], batch.labels[batch.mask]
        )
        if not torch.isfinite(loss):
            raise DataSetError(
                f"the loss became {loss.item()}: lower --learning-rate, or look for impossible "
                "values in the features with `longtrail status`"
            )
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm, foreach=True)
        self._optimizer.step()
        if self._average is not None:
            self._average.update_parameters(self.model)
        return float(loss.detach())

    def _candidate(self) -> nn.Module:
        """The weights that would be kept now."""
        return self.model if self._average is None else self._average.module

    def _validate(self, epoch: int, step: int, loss: float) -> None:
        model = self._candidate().eval()
        chances = probabilities(score(model, self.table, self.valid, truncate=True))
        value = auc(self.valid.clicked, chances)
        entry = {
            "epoch": epoch + 1,
            "step": step,
            "train_loss": loss,
            "valid_auc": value,
            "valid_logloss": logloss(self.valid.clicked, chances),
        }
        self._history.append(entry)
        logger.info("validation %s", entry)
        # Without an AUC (one class only) the last weights are as good as any.
        if value is None or self._best_auc is None or value > self._best_auc:
            self._best_auc = value
            self._best = {name: t.detach().clone() for name, t in model.state_dict().items()}

    def _save(self, epochs_done: int) -> None:
        tensors = with_prefix("model", self.model.state_dict())
        tensors |= with_prefix("best", self._best)
        tensors |= optimizer_tensors(self.model, self._optimizer)
        if self._average is not None:
            tensors |= with_prefix("average", self._average.state_dict())
        state = CheckpointState(
            fingerprint=self.checkpoint.fingerprint,
            tensors=f"state-{epochs_done}.safetensors",
            epochs_done=epochs_done,
            best_auc=self._best_auc,
            history=self._history,
        )
        self.checkpoint.save(state, tensors)

    def _restore(self) -> int:
        """Take the last checkpoint's state; the number of epochs already done."""
        saved = self.checkpoint.load()
        if saved is None:
            return 0
        state, tensors = saved
        self.model.load_state_dict(without_prefix("model", tensors))
        restore_optimizer(self.model, self._optimizer, tensors)
        if self._average is not None:
            self._average.load_state_dict(without_prefix("average", tensors))
        self._best = without_prefix("best", tensors)
        self._best_auc = state.best_auc
        self._history = list(state.history)
        return state.epochs_done
