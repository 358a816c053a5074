"""Step ``lm tune``: a language model learns to do the tasks of :mod:`encoders.lm.tasks`.

The result is a model folder like the one it was made from, with :data:`TUNING_FILE` in it. The
steps are those of pretraining (:mod:`encoders.lm.pretrainer`), on rows of whole examples of which
only the answers are learned.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import AwareDatetime

from encoders.config import Precision
from encoders.devices import Devices, products_in
from encoders.fingerprint import model_fingerprint
from encoders.lm.adapters import Adapters
from encoders.lm.examples import Example, TaskConfig, examples_fingerprint
from encoders.lm.instruction_rows import InstructionStream
from encoders.lm.learning_state import CurvePoint, RunManifest, Validation
from encoders.lm.loss import LanguageModelLoss
from encoders.lm.model_folder import (
    check_model_name,
    load_language_model,
    save_language_model,
)
from encoders.lm.pretrainer import Pretrainer, Validate
from encoders.lm.pretraining_setup import finished_run, open_run, prepare_model
from encoders.lm.recipes import LearningConfig
from encoders.lm.sharding import gather
from encoders.lm.tasks import build_examples, choose
from feature_repo.errors import EncoderError
from feature_repo.home import Home, complete_folder
from feature_repo.manifest import load_manifest
from feature_repo.progress import Progress, silent
from feature_repo.revision import git_revision

TUNING_FILE = "instruction_tuning.json"
HELD_OUT = "answer_loss"
"""Figure of the validations: nats per token of the held-out answers."""


@dataclass(frozen=True)
class InstructionTuningConfig:
    """How a model is tuned on tasks.

    Raises:
        EncoderError: If a value is outside its range.
    """

    tasks: TaskConfig = field(default_factory=TaskConfig)
    epochs: float = 4.0
    """Times that each example is learned from."""
    sequence_length: int = 256
    """Tokens of a row, at most the model's length. A row holds as many whole examples as fit; a
    longer one loses the oldest part of its record."""
    batch_rows: int = 16
    """Rows of a step."""
    pass_rows: int = 16
    """Rows computed at once; moves speed and memory only."""
    learning_rate: float = 1e-3
    """Highest, of AdamW; for the tiny recipe. 2e-5 is usual for models of billions, 2e-4 with
    adapters."""
    lora_rank: int | None = None
    """Learn low-rank adapters of all linear layers, and merge them into the weights; None = learn
    all weights."""
    precision: Precision = "bfloat16"
    """Of matrix products; weights are float32."""
    sharded: bool = False
    """Processes share out weights, gradients and the optimiser's state (FSDP), not only rows; not
    with adapters, whose state is small."""
    checkpoint_activations: bool = False
    """Compute each layer again for its gradient: memory of one, a third more time."""
    checkpoint_steps: int = 100
    """Steps that a kill can lose at most."""
    num_validations: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.epochs > 0:
            raise EncoderError(f"epochs must be above 0, got {self.epochs}")
        for name in ("sequence_length", "lora_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EncoderError(f"{name} must be at least 1, got {value}")
        if self.lora_rank is not None and self.sharded:
            raise EncoderError("adapters are not shared out: leave lora_rank or sharded out")
        self.learning(1)  # checks the rest

    def learning(self, steps: int) -> LearningConfig:
        """The steps' settings."""
        return LearningConfig(
            steps=steps,
            batch_rows=self.batch_rows,
            pass_rows=self.pass_rows,
            learning_rate=self.learning_rate,
            final_share=0.0,
            warmup_steps=steps // 10,
            weight_decay=0.0,
            precision=self.precision,
            sharded=self.sharded,
            checkpoint_activations=self.checkpoint_activations,
            checkpoint_steps=self.checkpoint_steps,
            num_snapshots=0,
            num_validations=self.num_validations,
            seed=self.seed,
        )


class InstructionTuningManifest(RunManifest):
    """What a tuned model was made from."""

    format: Literal[1] = 1
    created: AwareDatetime
    base_model: str
    base_model_fingerprint: str
    dataset: str
    source_fingerprint: str
    until: AwareDatetime
    """Nothing of this moment or later was learned from."""
    examples: str
    """Fingerprint of all examples, the held-out ones too."""
    num_examples: dict[str, int]
    """Task -> examples learned from."""
    config: dict[str, Any]
    steps: int
    num_tokens: int
    """Of answers, learned from."""
    curve: list[CurvePoint]
    held_out_before: float | None
    """:data:`HELD_OUT` of the base model; None where no example is held out for validation."""
    validations: list[Validation]
    git_revision: str | None


@dataclass(frozen=True)
class InstructionTuningSummary:
    """What a run of tune did."""

    folder: Path
    manifest: InstructionTuningManifest
    steps_resumed: int
    """Steps that a run before this one had done."""
    seconds: float


def tune_on_tasks(
    home: Home,
    base: Path,
    name: str,
    config: InstructionTuningConfig = InstructionTuningConfig(),  # immutable
    *,
    devices: Devices = Devices(),  # noqa: B008  # immutable
    progress: Progress = silent,
) -> InstructionTuningSummary:
    """Tune a model on the tasks of the home's tables, and write it to ``home.models / name``.

    The same model, tables, settings and number of threads give the same weights; a run that was
    killed goes on from its last checkpoint and ends with them too. Where just that model is
    there already, nothing is done.

    Args:
        home: The home folder; ingest has been run.
        base: Folder of the model to begin with.
        name: Of the tuned model.
        config: How.
        devices: Where it computes. Of several processes each calls this, the main one writes.
        progress: Told answer tokens and loss.

    Raises:
        EncoderError: If another model has the name, the model cannot be used, or the loss
            diverges.
        DataSetError: If no task has an example.
        MissingStepError: If nothing has been ingested, or the home has a corpus of other tables.
    """
    started = time.perf_counter()
    check_model_name(name)
    folder = home.models / name
    data = load_manifest(home)
    examples = build_examples(home, config.tasks)
    learned = choose(examples, "train")
    base_fingerprint = model_fingerprint(base)
    identity = json.dumps(
        [asdict(config), base_fingerprint, examples_fingerprint(examples)], sort_keys=True
    )
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    there = finished_run(
        folder, fingerprint, InstructionTuningManifest, TUNING_FILE, made_by="longtrail lm tune"
    )
    if there is not None:
        return InstructionTuningSummary(folder, there, 0, time.perf_counter() - started)
    # Of shared weights the main process' own are taken.
    model, tokenizer = load_language_model(base, empty=config.sharded and not devices.is_main)
    length = min(config.sequence_length, int(model.config.max_position_embeddings))
    stream = InstructionStream(
        learned,
        tokenizer,
        sequence_length=length,
        batch_rows=config.batch_rows,
        seed=config.seed,
    )
    learning = config.learning(stream.num_steps(config.epochs))
    held_out = [example for example in examples if example.split == "valid"]
    with open_run(folder, fingerprint, devices) as checkpoint:
        devices.wait()  # until the main process holds the folder
        adapters = (
            None if config.lora_rank is None else Adapters(model, config.lora_rank, config.seed)
        )
        loss = prepare_model(adapters.model if adapters else model, learning, devices)
        measure = _measure(loss, held_out, tokenizer, length, config) if held_out else None
        tuner = Pretrainer(
            loss,
            stream,
            learning,
            checkpoint,
            validate=measure,
            devices=devices,
            progress=progress if devices.is_main else silent,
        )
        before = measure() if measure else {}
        kept = checkpoint.state()
        state = tuner.run()
        whole_model = adapters.merged() if adapters else model
        weights = gather(dict(whole_model.named_parameters()), devices)
        manifest = InstructionTuningManifest(
            created=datetime.now(UTC),
            fingerprint=fingerprint,
            base_model=str(base),
            base_model_fingerprint=base_fingerprint,
            dataset=data.dataset,
            source_fingerprint=data.source_fingerprint,
            until=data.split.valid,
            examples=examples_fingerprint(examples),
            num_examples=dict(Counter(example.task for example in learned)),
            config=asdict(config),
            steps=state.num_steps,
            num_tokens=state.num_tokens,
            curve=state.curve,
            held_out_before=before.get(HELD_OUT),
            validations=state.validations,
            git_revision=git_revision(),
        )
        if devices.is_main:
            with complete_folder(folder) as part:
                save_language_model(whole_model, tokenizer, part, weights)
                manifest.save(part / TUNING_FILE)
    return InstructionTuningSummary(
        folder, manifest, kept.step if kept else 0, time.perf_counter() - started
    )


def _measure(
    loss: LanguageModelLoss,
    examples: Sequence[Example],
    tokenizer: Any,
    length: int,
    config: InstructionTuningConfig,
) -> Validate:
    """What measures the answers to examples."""
    stream = InstructionStream(
        examples,
        tokenizer,
        sequence_length=length,
        batch_rows=config.pass_rows,
        seed=config.seed,
    )

    @torch.no_grad()
    def measure() -> dict[str, float]:
        device = next(loss.parameters()).device
        nats = num_targets = 0.0
        for first in range(0, stream.num_rows, config.pass_rows):
            rows = stream.rows(first, min(first + config.pass_rows, stream.num_rows)).to(device)
            with products_in(config.precision, device):
                nats += float(loss(rows.inputs, rows.targets, rows.positions, by_token=True).sum())
            num_targets += rows.num_targets
        return {HELD_OUT: nats / num_targets}

    return measure
