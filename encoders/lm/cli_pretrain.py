"""The commands lm plan and pretrain; with those of what follows."""

from dataclasses import asdict, replace
from typing import get_args

import click

from encoders.cli_options import cpu_option, process_threads_option, track_option
from encoders.config import Precision
from encoders.lm.cli_average import commands as average_commands
from encoders.lm.recipes import RECIPES, Optimizer, PretrainingConfig
from feature_repo.command import Settings, emit, pass_settings, rounded, say
from feature_repo.errors import EncoderError
from feature_repo.home import Home
from feature_repo.progress import BarLine

# torch and transformers take seconds to import, and `longtrail --help` must be quick: a command
# imports the modules that need them when it runs.

_DEFAULT_RECIPE = "tiny"


@click.command(short_help="Tell what a pretraining needs of GPUs: memory and days.")
@click.option(
    "--recipe",
    "recipe_name",
    type=click.Choice(list(RECIPES)),
    default=_DEFAULT_RECIPE,
    show_default=True,
    help="Size of the model, and how it learns.",
)
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="All of them, on all machines.",
)
@click.option(
    "--gpu-memory-gb",
    type=click.FloatRange(min=0, min_open=True),
    default=80.0,
    show_default=True,
    help="Of each GPU.",
)
@click.option(
    "--peak-tflops",
    type=click.FloatRange(min=0, min_open=True),
    default=989.0,
    show_default=True,
    help="Of each GPU in bfloat16, without sparsity; the default is an H100's.",
)
@click.option(
    "--share-of-peak",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.4,
    show_default=True,
    help="That the training is assumed to reach.",
)
@click.option(
    "--tokens",
    type=click.FloatRange(min=0, min_open=True),
    help="To learn from, such as 3e12.  [default: the recipe's steps]",
)
@click.option(
    "--vocab-size", type=click.IntRange(min=1), default=65_536, show_default=True, help="Tokens."
)
def plan(
    recipe_name: str,
    gpus: int,
    gpu_memory_gb: float,
    peak_tflops: float,
    share_of_peak: float,
    tokens: float | None,
    vocab_size: int,
) -> None:
    """Tell what a pretraining needs: memory of GPUs and main machine, tokens per second, days.

    Nothing is computed or written. Formulas and their sources are in encoders/lm/plan.py.

    Example: longtrail lm plan --recipe 7b --gpus 8 --gpu-memory-gb 80 --tokens 3e12
    """
    from encoders.lm.plan import Cluster
    from encoders.lm.plan import plan as make_plan

    cluster = Cluster(gpus, gpu_memory_gb, peak_tflops, share_of_peak)
    made = make_plan(RECIPES[recipe_name](), cluster, tokens=tokens, vocab_size=vocab_size)
    if not made.fits:
        say(
            f"Does not fit: {made.total_gb:.0f} GiB per GPU of {gpu_memory_gb:.0f}. "
            "Give more --gpus or a smaller --recipe."
        )
    emit({k: _significant(v) for k, v in asdict(made).items()})


@click.command(short_help="Learn a language model from the corpus.")
@click.option(
    "--recipe",
    "recipe_name",
    type=click.Choice(list(RECIPES)),
    help="Size of the model, and how it learns; where a model goes on, how it learns.  "
    f"[default: that of MODEL where its folder tells, else {_DEFAULT_RECIPE}]",
)
@click.option("--name", help="Of the model.  [default: the recipe's, or MODEL-continued]")
@click.option(
    "--model",
    metavar="NAME",
    help="Go on with this model: one made here by name, or a folder.  [default: a new one]",
)
@click.option(
    "--tokenizer",
    default="domain",
    show_default=True,
    help="Of a new model: one made here by name, or a folder.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    help="Time to learn for; steps are measured once.  [default: the recipe's]",
)
@click.option("--steps", type=click.IntRange(min=1), help="Updates of the weights, instead.")
@click.option(
    "--batch-rows", type=click.IntRange(min=1), help="Rows of a step.  [default: the recipe's]"
)
@click.option(
    "--pass-rows",
    type=click.IntRange(min=1),
    help="Rows computed at once; moves speed and memory.  [default: the recipe's]",
)
@click.option(
    "--optimizer",
    type=click.Choice(get_args(Optimizer)),
    help="muon: AdamW, but Muon for the layers' matrices.  [default: what MODEL was "
    "pretrained with where its folder tells, else the recipe's]",
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Highest.  [default: the recipe's; where a model goes on, a tenth of what it was "
    "pretrained with, or of the recipe's where its folder does not tell]",
)
@click.option(
    "--general-share",
    type=click.FloatRange(min=0, max=1),
    help="Of general text.  [default: the corpus' mixture; half where a model goes on]",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    help="Of matrix products; weights are float32.  [default: the recipe's]",
)
@click.option(
    "--checkpoint-activations/--keep-activations",
    default=None,
    help="Compute layers again for their gradients: less memory.  [default: the recipe's]",
)
@click.option(
    "--compile/--no-compile",
    "compiled",
    default=None,
    help="Learn with torch.compile.  [default: the recipe's]",
)
@click.option("--seed", type=click.IntRange(min=0), help="Of weights and order.  [default: 0]")
@track_option
@cpu_option
@process_threads_option
@pass_settings
def pretrain(
    settings: Settings,
    *,
    recipe_name: str | None,
    name: str | None,
    model: str | None,
    tokenizer: str,
    minutes: float | None,
    steps: int | None,
    batch_rows: int | None,
    pass_rows: int | None,
    optimizer: Optimizer | None,
    learning_rate: float | None,
    general_share: float | None,
    precision: Precision | None,
    checkpoint_activations: bool | None,
    compiled: bool | None,
    seed: int | None,
    track: str | None,
    cpu: bool,
    threads: int | None,
) -> None:
    """Learn a language model from the corpus, from nothing or going on with --model.

    Writes a model folder in the Hugging Face format, tokenizer included, to HOME/lm/models/NAME. A
    run that was killed goes on when the same command is given again. Several processes learn one
    model together under torchrun or accelerate launch.

    \b
    Example:
      longtrail lm pretrain --recipe tiny --minutes 8
      torchrun --nproc_per_node=8 -m longtrail lm pretrain --recipe 7b
    """  # noqa: D301  # click takes the backspace itself
    from encoders.devices import open_devices
    from encoders.lm.pretraining import pretrain as run_pretraining

    if minutes is not None and steps is not None:
        raise EncoderError("give --minutes or --steps, not both")
    length = {} if minutes is None and steps is None else {"minutes": minutes, "steps": steps}
    given = {
        "batch_rows": batch_rows,
        "pass_rows": pass_rows,
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "precision": precision,
        "checkpoint_activations": checkpoint_activations,
        "compiled": compiled,
        "seed": seed,
    }
    recipe = RECIPES[recipe_name or _recipe_of(settings.home, model)]()
    config = _changed(recipe, {**given}, {**length}, general_share)
    with open_devices(cpu=cpu) as devices:
        with BarLine() as bars:
            summary = run_pretraining(
                settings.home,
                config,
                name=name,
                tokenizer=tokenizer,
                base=model,
                explicit=[option for option, value in given.items() if value is not None],
                threads=threads,
                devices=devices,
                track=track,
                reading=bars.bar("tokenising", "bytes"),
                learning=bars.bar("pretraining", "steps"),
            )
        if not devices.is_main:
            return
    manifest = summary.manifest
    if summary.steps_resumed:
        say(f"Went on after step {summary.steps_resumed}.")
    for step in manifest.skipped_steps:
        say(f"Note: step {step + 1} was left out: its loss leapt.")
    say(f"Next: longtrail lm average {summary.folder.name}")
    last = manifest.validations[-1].figures if manifest.validations else {}
    emit(
        {
            "model": summary.folder.name,
            "folder": str(summary.folder),
            "recipe": manifest.recipe,
            "base_model": manifest.base_model,
            "num_parameters": manifest.num_parameters,
            "vocab_size": manifest.vocab_size,
            "steps": manifest.steps,
            "num_tokens": manifest.num_tokens,
            "skipped_steps": len(manifest.skipped_steps),
            "loss": round(manifest.curve[-1].loss, 4),
            "valid_bits_per_byte": {source: round(value, 4) for source, value in last.items()},
            "tokens_per_s": round(manifest.tokens_per_s),
            "matmul_gflops": manifest.matmul_rate and round(manifest.matmul_rate / 1e9),
            "matmul_share": rounded(manifest.matmul_share),
            "peak_share": rounded(manifest.peak_share),
            "num_processes": manifest.num_processes,
            "seconds": round(summary.seconds, 1),
        }
    )


def _recipe_of(home: Home, model: str | None) -> str:
    """The recipe where none is named: that of the model that goes on, where it is known."""
    from encoders.lm.model_folder import find_language_model
    from encoders.lm.pretraining_setup import original_pretraining

    if model is None:
        return _DEFAULT_RECIPE
    original = original_pretraining(find_language_model(home, model))
    if original is None or original.recipe not in RECIPES:
        return _DEFAULT_RECIPE
    return original.recipe


def _changed(
    config: PretrainingConfig,
    given: dict[str, object],
    length: dict[str, object],
    general_share: float | None,
) -> PretrainingConfig:
    """A recipe with what the user overrides."""
    changes = {name: value for name, value in given.items() if value is not None} | length
    learning = replace(config.learning, **changes)  # type: ignore[arg-type]
    if general_share is None:
        return replace(config, learning=learning)
    return replace(config, learning=learning, general_share=general_share)


def _significant(value: object) -> object:
    """A plan's figure with four digits, for they span many powers of ten; all else as it is."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


commands: list[click.Command] = [plan, pretrain, *average_commands]
