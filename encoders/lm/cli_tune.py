"""The commands ``lm tune`` and ``lm generate``."""

from typing import get_args

import click

from encoders.cli_options import cpu_option, threads_option
from encoders.config import Precision
from feature_repo.command import Settings, emit, pass_settings, rounded, say
from feature_repo.progress import BarLine


@click.command(short_help="Teach a language model tasks made of the shop's own records.")
@click.option(
    "--model",
    default=None,
    metavar="NAME",
    show_default="the last average",
    help="The model to begin with: one made here by its name, a folder, or a name on the hub.",
)
@click.option(
    "--name", default=None, show_default="MODEL-tuned", help="Of the tuned model, made here."
)
@click.option(
    "--epochs",
    type=click.FloatRange(min=0, min_open=True),
    default=4.0,
    show_default=True,
    help="Times that each example is learned from.",
)
@click.option(
    "--max-examples",
    type=click.IntRange(min=1),
    default=5000,
    show_default=True,
    help="Learned from per task on items.",
)
@click.option(
    "--sequence-length",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Tokens of a row, at most the model's length; it holds as many examples as fit.",
)
@click.option(
    "--batch-rows",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Rows of a step.",
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=1e-3,
    show_default=True,
    help="Highest. 2e-5 is usual for billions of weights, 2e-4 with adapters.",
)
@click.option(
    "--lora-rank",
    type=click.IntRange(min=1),
    default=None,
    show_default="all weights learn",
    help="Learn adapters of this rank and merge them into the weights.",
)
@click.option(
    "--precision",
    type=click.Choice(get_args(Precision)),
    default="bfloat16",
    show_default=True,
    help="Of matrix products; weights are kept as float32.",
)
@click.option(
    "--checkpoint-activations",
    is_flag=True,
    help="Compute layers again for their gradients: less memory.",
)
@click.option(
    "--sharded", is_flag=True, help="Processes share out the weights and their state (FSDP)."
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the order."
)
@threads_option
@cpu_option
@pass_settings
def tune(
    settings: Settings,
    *,
    model: str | None,
    name: str | None,
    epochs: float,
    max_examples: int,
    sequence_length: int,
    batch_rows: int,
    learning_rate: float,
    lora_rank: int | None,
    precision: Precision,
    checkpoint_activations: bool,
    sharded: bool,
    seed: int,
    threads: int | None,
    cpu: bool,
) -> None:
    """Teach a language model tasks made of the shop's own records.

    Titles from attributes, attributes and bands from titles, search queries from titles, and what
    a user buys next. A part of the items and all times from the validation period on are held out
    for `longtrail lm evaluate`. A run that was killed goes on when the same command is given again.
    Several processes learn one model together under torchrun or accelerate launch.

    \b
    Examples:
      longtrail lm tune --model tiny-average --epochs 2
      longtrail lm tune --model some/open-model --lora-rank 16 --learning-rate 2e-4
    """  # noqa: D301  # click takes the backspace itself
    from encoders.devices import open_devices, torch_threads
    from encoders.lm.examples import TaskConfig
    from encoders.lm.instruction_tuning import InstructionTuningConfig, tune_on_tasks
    from encoders.lm.model_choice import model_to_tune
    from encoders.lm.model_folder import find_language_model

    config = InstructionTuningConfig(
        tasks=TaskConfig(max_train=max_examples),
        epochs=epochs,
        sequence_length=sequence_length,
        batch_rows=batch_rows,
        learning_rate=learning_rate,
        lora_rank=lora_rank,
        precision=precision,
        checkpoint_activations=checkpoint_activations,
        sharded=sharded,
        seed=seed,
    )
    home = settings.home
    base = model_to_tune(home) if model is None else find_language_model(home, model)
    with (
        open_devices(cpu=cpu) as devices,
        torch_threads(threads, num_local_processes=devices.num_local_processes),
        BarLine() as bars,
    ):
        summary = tune_on_tasks(
            home,
            base,
            name or f"{base.name}-tuned",
            config,
            devices=devices,
            progress=bars.bar("tuning", "steps"),
        )
        if not devices.is_main:
            return
    manifest = summary.manifest
    if summary.steps_resumed:
        say(f"Went on after step {summary.steps_resumed}.")
    last = manifest.validations[-1].figures if manifest.validations else {}
    say("Next: longtrail lm evaluate")
    emit(
        {
            "model": summary.folder.name,
            "folder": str(summary.folder),
            "base_model": manifest.base_model,
            "num_examples": manifest.num_examples,
            "steps": manifest.steps,
            "held_out_loss_before": rounded(manifest.held_out_before),
            "held_out_loss_after": rounded(next(iter(last.values()), None)),
            "until": manifest.until.isoformat(),
            "seconds": round(summary.seconds, 1),
        }
    )


@click.command(short_help="Let a language model continue texts.")
@click.argument("model")
@click.argument("prompts", nargs=-1, required=True)
@click.option(
    "--task",
    metavar="INSTRUCTION",
    default=None,
    help="Ask a tuned model this of every PROMPT, in the words of its tasks.  [default: continue]",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Written at most.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Of what is drawn; 0 = always the likeliest token.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Draw from the likeliest tokens that hold this much probability.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the draws."
)
@threads_option
@cpu_option
@pass_settings
def generate(
    settings: Settings,
    *,
    model: str,
    prompts: tuple[str, ...],
    task: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    threads: int | None,
    cpu: bool,
) -> None:
    """Let a language model continue texts, until it ends them.

    MODEL is one made here by its name, a folder, or a name on the hub. A single PROMPT's
    continuation is shown on stderr while it is written.

    \b
    Examples:
      longtrail lm generate tiny-average "<|listing|><|title|>white hanging"
      longtrail lm generate tiny-average-tuned --task "search query" "<|listing|><|title|>lunch bag"
    """  # noqa: D301  # click takes the backspace itself
    from encoders.devices import open_devices, torch_threads
    from encoders.lm.generation import GenerationOptions
    from encoders.lm.generation import generate as write
    from encoders.lm.model_folder import find_language_model, load_language_model
    from encoders.lm.records import ANSWER, INSTRUCTION

    options = GenerationOptions(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    folder = find_language_model(settings.home, model)
    loaded, tokenizer = load_language_model(folder)
    asked = list(prompts)
    if task is not None:
        asked = [f"{INSTRUCTION}{task}{prompt}{ANSWER}" for prompt in prompts]
    single = len(asked) == 1
    with open_devices(cpu=cpu) as devices, torch_threads(threads), BarLine() as bars:
        texts = write(
            loaded.to(devices.device),
            tokenizer,
            asked,
            options,
            on_text=_show if single else None,
            **({} if single else {"progress": bars.bar("generate", "texts")}),
        )
    if single:
        say("")
    emit({"model": str(folder), "texts": texts})


def _show(piece: str) -> None:
    """A piece of a text that is being written."""
    click.echo(piece, nl=False, err=True)


commands: list[click.Command] = [tune, generate]
