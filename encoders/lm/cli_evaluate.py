"""The command ``lm evaluate``."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from encoders.cli_options import cpu_option, threads_option
from feature_repo.command import Settings, emit, pass_settings, say
from feature_repo.progress import Progress, progress_bar

if TYPE_CHECKING:
    from encoders.lm.evaluation_documents import Evaluation, ModelFigures


@click.command(short_help="Measure language models side by side, on text none has learned.")
@click.argument("models", nargs=-1)
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="Also write this HTML file.",
)
@click.option(
    "--split",
    type=click.Choice(["valid", "test"]),
    default="test",
    show_default=True,
    help="Of the corpus and the tasks.",
)
@click.option(
    "--document-bytes",
    type=click.IntRange(min=1),
    default=200_000,
    show_default=True,
    help="Of held-out text per source.",
)
@click.option("--tasks/--no-tasks", default=True, show_default=True, help="Ask the tasks, too.")
@click.option(
    "--max-examples",
    type=click.IntRange(min=1),
    default=300,
    show_default=True,
    help="Asked per task.",
)
@click.option(
    "--ngram-order",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    help="Of the baseline that counts the training text; 0 = none.",
)
@click.option(
    "--speed-rounds",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Times that each model writes the same text; 0 = speed is not measured.",
)
@threads_option
@cpu_option
@pass_settings
def evaluate(
    settings: Settings,
    *,
    models: tuple[str, ...],
    report: Path | None,
    split: Any,
    document_bytes: int,
    tasks: bool,
    max_examples: int,
    ngram_order: int,
    speed_rounds: int,
    threads: int | None,
    cpu: bool,
) -> None:
    """Measure language models side by side, on text none has learned.

    Bits per byte by source, the tasks, tokens per word and byte, characters per second. MODELS are
    names of models made here, folders, or names on the hub; the others are compared with the first.
    Without any: the model made last and those it was made from. What was measured of a model is
    kept in the home folder and not measured again.

    \b
    Examples:
      longtrail lm evaluate --report models.html
      longtrail lm evaluate tiny tiny-average some/other/model
    """  # noqa: D301  # click takes the backspace itself
    from encoders.devices import open_devices, torch_threads
    from encoders.lm.evaluation import EVALUATION_FILE, EvaluationConfig, evaluate_models
    from encoders.lm.examples import TaskConfig
    from encoders.lm.model_choice import models_to_compare
    from encoders.lm.model_folder import find_language_model

    home = settings.home
    config = EvaluationConfig(
        split=split,
        document_bytes=document_bytes,
        tasks=TaskConfig(max_valid=max_examples, max_test=max_examples),
        with_tasks=tasks,
        ngram_order=ngram_order,
        speed_rounds=speed_rounds,
    )
    folders = (
        [find_language_model(home, model) for model in models]
        if models
        else models_to_compare(home)
    )
    with open_devices(cpu=cpu) as devices, torch_threads(threads):
        evaluation = evaluate_models(home, folders, config, device=devices.device, bars=_bar)
    if report is not None:
        from encoders.lm.evaluation_report import write_report

        write_report(report, evaluation)
    for line in _table(evaluation):
        say(line)
    emit(
        {
            "split": evaluation.split,
            "models": {model.name: _figures(model) for model in evaluation.models},
            "evaluation": str(home.evaluations / EVALUATION_FILE),
            "report": report and str(report),
        }
    )


def _bar(what: str) -> AbstractContextManager[Progress]:
    return progress_bar(what, "parts")


def _table(evaluation: "Evaluation") -> list[str]:
    """The models for a person, one line each."""
    width = max(len(model.name) for model in evaluation.models) + 2
    columns = list(evaluation.models[0].bits_per_byte)
    tasks = sorted({task for model in evaluation.models for task in model.tasks})
    lines = ["bits per byte".ljust(width) + "".join(f"{name:>13}" for name in columns)]
    for model in evaluation.models:
        values = (f"{model.bits_per_byte[name].value:13.4f}" for name in columns)
        lines.append(model.name.ljust(width) + "".join(values))
    if tasks:
        lines.append("exactly right".ljust(width) + "".join(f"{t[-18:]:>20}" for t in tasks))
    for model in evaluation.models if tasks else ():
        if model.tasks:
            values = (f"{model.tasks[task].model.exact:20.1%}" for task in tasks)
            lines.append(model.name.ljust(width) + "".join(values))
    return lines


def _figures(model: "ModelFigures") -> dict[str, Any]:
    """A model in the line of output."""
    fertility = model.fertility
    return {
        "bits_per_byte": {
            name: round(found.value, 4) for name, found in model.bits_per_byte.items()
        },
        "tokens_per_byte": {
            name: round(found.tokens_per_byte, 4) for name, found in fertility.items()
        },
        "tasks": {name: round(found.model.exact, 4) for name, found in model.tasks.items()},
        "rules": {
            name: {rule: round(one.exact, 4) for rule, one in found.rules.items()}
            for name, found in model.tasks.items()
        },
        "characters_per_s": model.speed and round(model.speed.characters_per_s, 1),
    }


commands: list[click.Command] = [evaluate]
