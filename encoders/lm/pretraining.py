"""Step ``lm pretrain``: a language model learns from the corpus, from nothing or going on.

The result is a model folder in the Hugging Face format, tokenizer included, that
``AutoModelForCausalLM`` and ``longtrail encode --model`` take like any other::

    config.json, model.safetensors, tokenizer files
    pretraining.json         what it was made from, and how it went (:class:`PretrainingManifest`)
    checkpoints/step-<N>/    weights alone, for ``lm average``
"""

import json
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from encoders.checkpoint import Checkpoint
from encoders.devices import Devices, open_devices, torch_threads
from encoders.fingerprint import model_fingerprint
from encoders.lm.corpus import load_corpus
from encoders.lm.documents import start_token
from encoders.lm.learning_state import LearningState
from encoders.lm.model import make_model
from encoders.lm.model_folder import (
    PRETRAINING_FILE,
    check_model_name,
    find_language_model,
    load_language_model,
    save_language_model,
)
from encoders.lm.packing import TokenStream
from encoders.lm.pretrainer import Pretrainer
from encoders.lm.pretraining_manifest import PretrainingManifest
from encoders.lm.pretraining_setup import (
    continued,
    finished_run,
    open_run,
    prepare_model,
    run_fingerprint,
    token_weights,
    trained_shape,
)
from encoders.lm.recipes import PretrainingConfig
from encoders.lm.sharding import gather
from encoders.lm.shards import (
    COMMAND,
    TokenShard,
    make_shards,
    open_shards,
    tokenizer_fingerprint,
)
from encoders.lm.snapshots import put_snapshots, snapshots_in
from encoders.lm.throughput import (
    card_peak,
    measure_products,
    operations_per_token,
    product_shapes,
)
from encoders.lm.tokenizer_folder import find_tokenizer, read_tokenizer
from encoders.lm.validation import ValidationTexts
from encoders.tracking import check_tracker, open_tracker
from feature_repo.home import Home, complete_folder
from feature_repo.progress import Progress, silent
from feature_repo.revision import git_revision

DEFAULT_TOKENIZER = "domain"


@dataclass(frozen=True)
class PretrainingSummary:
    """What a run of pretrain did."""

    folder: Path
    manifest: PretrainingManifest
    steps_resumed: int
    """Steps that a run before this one had done."""
    seconds: float


def pretrain(
    home: Home,
    config: PretrainingConfig,
    *,
    name: str | None = None,
    tokenizer: str = DEFAULT_TOKENIZER,
    base: str | None = None,
    explicit: Collection[str] = (),
    threads: int | None = None,
    devices: Devices | None = None,
    track: str | None = None,
    reading: Progress = silent,
    learning: Progress = silent,
) -> PretrainingSummary:
    """Learn a language model from the corpus, and write it to ``home.models / name``.

    A run that was killed goes on from its last checkpoint, and on a CPU with as many threads ends
    with the same weights. Where several processes learn one model, each of them calls this and gets
    the same result; the main one writes.

    Args:
        home: A corpus has been built.
        config: How. Where a model goes on, its layers replace the recipe's, and learning rate,
            optimiser, length of rows and mixture are those of
            :func:`encoders.lm.pretraining_setup.continued`.
        name: Of the model; None = the recipe's, or ``<base>-continued``.
        tokenizer: One of the home's by name, or a folder; not looked at where a model goes on.
        base: Model to go on with, one of the home's by name, or a folder.
        explicit: Settings of ``config.learning`` that stay as they are where a model goes on.
        threads: Of the arithmetic; None = see :func:`encoders.devices.torch_threads`.
        devices: Of :func:`encoders.devices.open_devices`; None = opened here.
        track: Where curves go, one of :data:`encoders.tracking.TRACKERS`; None = nowhere.
        reading: Told bytes tokenised.
        learning: Told steps, loss, tokens per second and the share of the matrix products' rate.

    Returns:
        What was made.

    Raises:
        EncoderError: If the model exists already, tokenizer and model do not fit, the corpus is
            empty, or the loss diverges.
        MissingStepError: If there is no corpus.
        LongtrailError: If the package of the tracker is not installed.
    """
    started = time.perf_counter()
    check_tracker(track)
    base_folder = None if base is None else find_language_model(home, base)
    name = name or (config.recipe if base_folder is None else f"{base_folder.name}-continued")
    check_model_name(name)
    folder = home.models / name
    if base_folder is not None:
        config = continued(config, base_folder, explicit)
    with ExitStack() as stack:
        if devices is None:
            devices = stack.enter_context(open_devices())
        local = devices.num_local_processes
        num_threads = stack.enter_context(torch_threads(threads, num_local_processes=local))
        if not devices.is_main:
            reading = learning = silent
        # Of shared weights the main process' own are taken.
        empty = config.learning.sharded and not devices.is_main
        if base_folder is None:
            made = read_tokenizer(find_tokenizer(home, tokenizer))
            model = make_model(config.shape, made, seed=config.learning.seed, empty=empty)
        else:
            model, made = load_language_model(base_folder, empty=empty)
        corpus = load_corpus(home)
        fingerprint = run_fingerprint(config, corpus, made, base_folder, devices)
        there = finished_run(
            folder, fingerprint, PretrainingManifest, PRETRAINING_FILE, made_by=COMMAND
        )
        if there is not None:
            return PretrainingSummary(folder, there, 0, time.perf_counter() - started)
        if devices.is_main:
            make_shards(home, made, progress=reading)
        checkpoint = stack.enter_context(open_run(folder, fingerprint, devices))
        devices.wait()  # until the main process has made the shards and holds the folder
        state = checkpoint.state()
        tracker = stack.enter_context(
            open_tracker(
                track if devices.is_main else None, home, name, step=state.step if state else 0
            )
        )
        tracker.settings(asdict(config))
        shards = open_shards(home, made)
        stream = TokenStream(
            shards["train"],
            token_weights(corpus, config, shards["train"]),
            start=start_token(made),
            sequence_length=min(config.shape.sequence_length, model.config.max_position_embeddings),
            batch_rows=config.learning.batch_rows,
            seed=config.learning.seed,
        )
        trainer = _trainer(model, made, stream, shards["valid"], config, checkpoint, devices)
        trainer.tracker, trainer.progress = tracker, learning
        last = trainer.run()
        weights = gather(dict(model.named_parameters()), devices)
        used = asdict(config) | {"shape": trained_shape(model.config, stream.sequence_length)}
        manifest = PretrainingManifest(
            created=datetime.now(UTC),
            fingerprint=fingerprint,
            recipe=config.recipe,
            base_model=None if base_folder is None else str(base_folder),
            base_model_fingerprint=None if base_folder is None else model_fingerprint(base_folder),
            config=json.loads(json.dumps(used)),  # lists, as they are read again
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            vocab_size=model.config.vocab_size,
            tokenizer=tokenizer_fingerprint(made),
            corpus=corpus.fingerprint,
            dataset=corpus.dataset,
            until=corpus.until,
            mixture=stream.shares,
            steps=last.num_steps,
            num_tokens=last.num_tokens,
            seconds=last.seconds,
            tokens_per_s=last.num_tokens / last.seconds,
            matmul_rate=trainer.matmul_rate,
            matmul_share=trainer.matmul_share,
            peak_share=_peak_share(trainer),
            device=devices.device.type,
            num_processes=devices.num_processes,
            num_threads=num_threads,
            skipped_steps=last.skipped,
            curve=last.curve,
            validations=last.validations,
            snapshots=snapshots_in(checkpoint.folder),
            seed=config.learning.seed,
            git_revision=git_revision(),
        )
        if devices.is_main:
            with complete_folder(folder) as part:
                save_language_model(model, made, part, weights)
                put_snapshots(checkpoint.folder, part)
                manifest.save(part / PRETRAINING_FILE)
        return PretrainingSummary(
            folder, manifest, state.step if state else 0, time.perf_counter() - started
        )


def _trainer(
    model: Any,
    tokenizer: Any,
    stream: TokenStream,
    valid: Mapping[str, TokenShard],
    config: PretrainingConfig,
    checkpoint: Checkpoint[LearningState],
    devices: Devices,
) -> Pretrainer:
    """What learns the model, with this machine's rate for the model's products."""
    learning, products = config.learning, product_shapes(model)
    rows = min(learning.pass_rows, learning.batch_rows)
    rate = measure_products(
        products,
        num_tokens=rows * stream.sequence_length,
        precision=learning.precision,
        device=devices.device,
    )
    loss = prepare_model(model, config.learning, devices)
    validate = partial(
        ValidationTexts.choose(valid, config.validation_bytes).bits_per_byte,
        loss,
        start=start_token(tokenizer),
        device=devices.device,
        precision=learning.precision,
    )
    return Pretrainer(
        loss,
        stream,
        learning,
        checkpoint,
        validate=validate,
        devices=devices,
        operations_per_token=operations_per_token(products),
        matmul_rate=rate,
    )


def _peak_share(trainer: Pretrainer) -> float | None:
    """Of the card's promised operations per second, as :class:`PretrainingManifest` tells it."""
    peak, share = card_peak(trainer.devices.device), trainer.matmul_share
    if peak is None or share is None or trainer.matmul_rate is None:
        return None
    return share * trainer.matmul_rate / peak
