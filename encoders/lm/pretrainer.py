"""The steps of learning a language model: loss, optimiser, guards, going on after a kill.

A step's batch and learning rate are functions of the step and the settings, and nothing is drawn at
random: the number of steps done is all that a killed run must know to go on, beside the tensors,
and on a CPU with as many threads it ends with the bits it would have had.

Several processes share the rows of every step. Their sums are rounded in another order than one
process' are, so losses agree up to rounding.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from encoders.checkpoint import Checkpoint
from encoders.devices import Devices, products_in
from encoders.lm.learning_state import (
    CurvePoint,
    LearningState,
    Validation,
    snapshot_steps,
    validation_steps,
)
from encoders.lm.loss import LanguageModelLoss
from encoders.lm.optimization import learning_tensors, make_optimizers, restore_learning
from encoders.lm.packing import BatchStream, PackedRows
from encoders.lm.recipes import LearningConfig
from encoders.lm.sharding import gather, whole
from encoders.lm.snapshots import forget_snapshots, keep_snapshot
from encoders.lm.spikes import WINDOW, is_spike
from encoders.schedule import warmup_cosine
from encoders.tracking import Meter, NoTracker, Tracker
from feature_repo.errors import EncoderError
from feature_repo.progress import Progress, silent

_CURVE_POINTS = 200
_TRIAL_STEPS = (2, 20)
"""Steps that are not timed and steps that are, where a time is given."""
_TRIAL_SECONDS = 10.0
"""After which a trial ends, be its steps done or not."""

Validate = Callable[[], dict[str, float]]
"""Gives figures by name, lower = better; called by all processes."""


@dataclass
class Pretrainer:
    """Learns the weights of a causal model in place.

    Args:
        loss: The model, float32, on ``devices.device``; where ``config.sharded`` and there are
            several processes, already shared out.
        stream: The batches.
        config: How.
        checkpoint: Where the state and the snapshots go.
        validate: Measures the weights in between; None = nothing is measured.
        devices: This process and those that learn with it.
        tracker: Told the curves.
        progress: Told steps, loss, tokens per second, and the share of ``matmul_rate``.
        operations_per_token: Of the model's matrix products.
        matmul_rate: Operations per second that this process' products reach alone.
    """

    loss: LanguageModelLoss
    stream: BatchStream
    config: LearningConfig
    checkpoint: Checkpoint[LearningState]
    validate: Validate | None = None
    devices: Devices = field(default_factory=Devices)
    tracker: Tracker = field(default_factory=NoTracker)
    progress: Progress = silent
    operations_per_token: int = 0
    matmul_rate: float | None = None

    def __post_init__(self) -> None:
        rows, processes = self.config.batch_rows, self.devices.num_processes
        if rows % processes:
            raise EncoderError(
                f"the rows of a batch must be a multiple of the number of processes ({processes}), "
                f"got {rows}: give another --batch-rows"
            )
        self._learned = [p for p in self.loss.parameters() if p.requires_grad]
        self._optimizers = make_optimizers(self.loss.model, self.config)
        self._meter = Meter()
        self.state = LearningState(
            fingerprint=self.checkpoint.fingerprint,
            tensors="",
            num_steps=self.config.steps or 0,
            step=0,
            num_tokens=0,
            seconds=0.0,
            recent=[],
            skipped=[],
            since_point=[],
            curve=[],
            validations=[],
        )

    def run(self) -> LearningState:
        """Take the steps that are left.

        Returns:
            The last state.

        Raises:
            EncoderError: If the loss is no longer finite, or leaps again and again.
        """
        self._restore()
        self.loss.train()
        if not self.state.num_steps:
            num_steps = self.devices.agree(self._trial())
            self.state = self.state.model_copy(update={"num_steps": num_steps})
            self._save()
        num_steps = self.state.num_steps
        snapshots = snapshot_steps(num_steps, self.config)
        validations = validation_steps(num_steps, self.config)
        self.progress(self.state.step, num_steps)
        while self.state.step < num_steps:
            self._learn(num_steps)
            step = self.state.step
            if step in snapshots:
                self._keep_weights(step)
            if step in validations and self.validate is not None:
                self._validate(self.validate)
            if step in validations or step % self.config.checkpoint_steps == 0:
                self._save()
        self.loss.eval()
        return self.state

    @property
    def matmul_share(self) -> float | None:
        """Of ``matmul_rate``, that the run's steps reached; None where nothing is to compare."""
        if not self.matmul_rate or not self.state.seconds:
            return None
        operations = self.state.num_tokens * self.operations_per_token
        return operations / self.state.seconds / self.devices.num_processes / self.matmul_rate

    def _learn(self, num_steps: int) -> None:
        """One step, and the news of it."""
        started = time.perf_counter()
        state = self.state
        rows = self.stream.batch(state.step)
        loss = self._gradients(rows)
        skipped = is_spike(loss, state.recent)
        if skipped:
            self._forget_gradients()
        else:
            self._update(state.step, num_steps)
        seconds = time.perf_counter() - started
        tokens = rows.num_targets
        update: dict[str, Any] = {
            "step": state.step + 1,
            "num_tokens": state.num_tokens + tokens,
            "seconds": state.seconds + seconds,
            "since_point": [*state.since_point, loss],
        }
        if skipped:
            update["skipped"] = [*state.skipped, state.step]
        else:
            update["recent"] = [*state.recent, loss][-WINDOW:]
        self.state = state.model_copy(update=update)
        self._meter.add(tokens, loss, seconds)
        if skipped:
            self._check_spikes(loss)
        self._tell(loss, num_steps)

    def _gradients(self, rows: PackedRows) -> float:
        """Add up the gradients of the step's mean loss, and return it: the same in every process.

        Raises:
            EncoderError: If the loss is not finite.
        """
        total, devices = rows.num_targets, self.devices
        share = self.config.batch_rows // devices.num_processes
        own = rows.rows(devices.process_index * share, (devices.process_index + 1) * share)
        # FSDP takes the mean of the processes' gradients, not their sum.
        factor = devices.num_processes if self._is_sharded else 1
        loss = torch.zeros((), device=devices.device)
        for first in range(0, share, self.config.pass_rows):
            part = own.rows(first, first + self.config.pass_rows).to(devices.device)
            with products_in(self.config.precision, devices.device):
                nats = self.loss(part.inputs, part.targets, part.positions) / total
            (nats * factor).backward()
            loss += nats.detach()
        if self._is_sharded:
            devices.add_up(loss)
        else:
            loss = devices.reduce_gradients(self.loss, loss)
        value = float(loss)
        if not math.isfinite(value):
            raise EncoderError(self._diverged(value))
        return value

    def _update(self, step: int, num_steps: int) -> None:
        factor = warmup_cosine(
            step,
            num_steps=num_steps,
            warmup_steps=self.config.warmup_steps,
            final=self.config.final_share,
        )
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.learning_rate * factor
        norm = nn.utils.clip_grad_norm_(self._learned, self.config.clip_norm, foreach=True)
        if not math.isfinite(float(whole(norm))):
            raise EncoderError(self._diverged(float("nan")))
        for optimizer in self._optimizers:
            optimizer.step()
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _diverged(self, value: float) -> str:
        return (
            f"the loss became {value} in step {self.state.step + 1}: lower --learning-rate, or try "
            "--precision float32"
        )

    def _check_spikes(self, loss: float) -> None:
        """Stop where too many of the last steps were skipped."""
        last = [step for step in self.state.skipped if step >= self.state.step - WINDOW]
        if len(last) > self.config.max_spikes:
            raise EncoderError(
                f"the loss leapt in {len(last)} of the last {WINDOW} steps, to {loss:.2f} in step "
                f"{self.state.step}, where {statistics.median(self.state.recent):.2f} was usual: "
                "lower --learning-rate, or look for broken text in the corpus"
            )

    def _tell(self, loss: float, num_steps: int) -> None:
        """News of a step to the bar, the curve and the tracker."""
        share = self.matmul_share
        rate = self.state.num_tokens / self.state.seconds
        shown = {} if share is None else {"matmul_share": share}
        self.progress(1, num_steps, loss=loss, tokens_per_s=rate, **shown)
        state = self.state
        if state.step % max(1, num_steps // _CURVE_POINTS) and state.step < num_steps:
            return
        point = CurvePoint(step=state.step, loss=statistics.fmean(state.since_point))
        self.state = state.model_copy(update={"since_point": [], "curve": [*state.curve, point]})
        figures = self._meter.take()
        self.tracker.figures(
            state.step,
            {
                "train/loss": point.loss,
                "train/tokens_per_s": figures["train/rows_per_s"],
                "train/matmul_share": share,
                "train/learning_rate": self._optimizers[0].param_groups[0]["lr"],
            },
        )

    def _validate(self, validate: Validate) -> None:
        self.loss.eval()
        figures = validate()
        self.loss.train()
        found = Validation(step=self.state.step, figures=figures)
        self.state = self.state.model_copy(update={"validations": [*self.state.validations, found]})
        self.tracker.figures(self.state.step, {f"valid/{n}": v for n, v in figures.items()})

    def _trial(self) -> int:
        """How many steps fit into the time given; weights and optimiser are as before."""
        assert self.config.minutes is not None
        before = [parameter.detach().clone() for parameter in self._learned]
        warm, timed = _TRIAL_STEPS
        seconds: list[float] = []
        end = time.perf_counter() + _TRIAL_SECONDS
        for step in range(warm + timed):
            started = time.perf_counter()
            self._gradients(self.stream.batch(step))
            self._update(step, warm + timed)
            seconds.append(time.perf_counter() - started)
            # Sharded processes must take the same number of steps.
            if step >= warm and self.devices.agree(time.perf_counter() > end):
                break
        with torch.no_grad():
            for parameter, value in zip(self._learned, before, strict=True):
                parameter.copy_(value)
        self._optimizers = make_optimizers(self.loss.model, self.config)
        return max(1, int(self.config.minutes * 60 / statistics.median(seconds[warm:])))

    @property
    def _is_sharded(self) -> bool:
        return self.config.sharded and self.devices.num_processes > 1

    def _keep_weights(self, step: int) -> None:
        """Write the weights alone, for averaging."""
        tensors = gather(dict(self.loss.model.named_parameters()), self.devices)
        if self.devices.is_main:
            keep_snapshot(self.checkpoint.folder, step, tensors)

    def _save(self) -> None:
        tensors = learning_tensors(self.loss.model, self._optimizers, self.devices)
        if self.devices.is_main:
            name = f"state-{self.state.step}.safetensors"
            self.checkpoint.save(self.state.model_copy(update={"tensors": name}), tensors)

    def _restore(self) -> None:
        """Take the last checkpoint's state, where there is one."""
        saved = self.checkpoint.load()
        if saved is not None:
            self.state, tensors = saved
            restore_learning(self.loss.model, self._optimizers, tensors)
        elif self.devices.is_main:
            forget_snapshots(self.checkpoint.folder)
        self.devices.wait()  # before the main process replaces what the others read
