"""Training rows per second, against FuxiCTR's DIN in the same run, and what torch.compile adds.

From the project's root: ``pip install fuxictr`` (into any environment that has this project's
packages; it is needed here only), then ``python -m benchmarks.bench_training``.

Compared are steps on batches that are ready in memory (:mod:`benchmarks.training_steps`); one
thread; histories of the same length, all full; the same number of rows. ``ids``: vectors learned
per item, recipe ``din_ids``. ``texts``: frozen vectors of 384 numbers, projected to the width,
recipe ``din_text``; both gather them from one tensor within the step, which FuxiCTR leaves to its
loader, a slower one over pandas. Of these two the widths of vectors, attention and head are
FuxiCTR's, and there are no other features. FuxiCTR's model is its own class with its own
``train_step`` on a feature map made by hand, its attention with ReLU, as ours, not its default
Dice.

``bahe_base`` and ``bahe_fast`` are these recipes, their deep half of MiniLM's shape trained, with
evidence and dense features: they do more than DIN, and stand against FuxiCTR's with texts.

Ours is measured with one row per history, the same work as FuxiCTR's, and with several that share a
history, as logs have them; FuxiCTR's has a history per row. The latter are measured once more with
forward and backward pass compiled as ``longtrail train --compile`` does it. Compiling takes minutes
per model on two cores; how long the first step took stands beside it, for what is saved must first
pay for that.
"""

import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import click

from benchmarks.results_file import given_command, markdown_table, write_result
from benchmarks.training_steps import (
    ID_WIDTH,
    OURS,
    TEXT_WIDTH,
    Sizes,
    Step,
    fuxictr_step,
    our_step,
)
from benchmarks.turns import ratio, shown
from encoders.devices import torch_threads

MEASURED_BEFORE = {"ids": 7_100, "ids_and_texts": 4_200}
"""Rows/s of FuxiCTR's DIN with all its data handling, one thread, as measured before this."""
_COMPILED = "compiled_"
"""Begins the name of a step that is compiled."""
_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""Where torch.compile keeps what it has compiled; a file that a kill left half written fails."""


def contenders(
    sizes: Sizes,
    models: Sequence[str],
    *,
    num_candidates: int,
    with_fuxictr: bool,
    with_compiled: bool,
) -> dict[str, Step]:
    """What takes turns.

    Args:
        sizes: Of the batches.
        models: Of :data:`benchmarks.training_steps.OURS`.
        num_candidates: Rows that share a history, in the second of each model's.
        with_fuxictr: Also FuxiCTR's DIN on the same input, where there is one.
        with_compiled: Also the second of each model's, compiled.

    Raises:
        ClickException: If FuxiCTR is wanted and not installed.
    """
    steps: dict[str, Step] = {}
    for kind in models:
        config = OURS[kind]
        if with_fuxictr and kind in ("ids", "texts"):
            steps[f"fuxictr_{kind}"] = fuxictr_step(sizes, texts=kind == "texts")
        for shared in (1, num_candidates):
            steps[f"ours_{kind}_{shared}"] = our_step(sizes, config, num_candidates=shared)
        if with_compiled:
            steps[f"{_COMPILED}ours_{kind}_{num_candidates}"] = our_step(
                sizes, config, num_candidates=num_candidates, compiled=True
            )
    return steps


@contextmanager
def fresh_compile_cache() -> Iterator[None]:
    """Let torch.compile find nothing of before: neither what makes it quick nor a killed one's."""
    before = os.environ.get(_CACHE_VARIABLE)
    with TemporaryDirectory() as folder:
        os.environ[_CACHE_VARIABLE] = folder
        try:
            yield
        finally:
            del os.environ[_CACHE_VARIABLE]
            if before is not None:
                os.environ[_CACHE_VARIABLE] = before


def compile_all(steps: Mapping[str, Step]) -> dict[str, float]:
    """Take the first step of those that are compiled.

    Returns:
        Name without its beginning -> seconds that it took.

    Raises:
        ClickException: If some are, and there is no C++ compiler.
    """
    names = [name for name in steps if name.startswith(_COMPILED)]
    compilers = (os.environ.get("CXX"), "g++", "clang++")
    if names and not any(shutil.which(name) for name in compilers if name):
        raise click.ClickException(
            "torch.compile needs a C++ compiler, and there is none: install g++, or pass "
            "--no-compile"
        )
    seconds = {}
    for name in names:
        started = time.perf_counter()
        steps[name]()
        seconds[name.removeprefix(_COMPILED)] = time.perf_counter() - started
        click.echo(f"{name} after {seconds[name.removeprefix(_COMPILED)]:.0f} s", err=True)
    return seconds


def compare(rates: Mapping[str, list[float]]) -> dict[str, Any]:
    """Medians and ratios of the turns.

    Args:
        rates: Of :func:`measure`.

    Returns:
        ``rows_per_s``, ``rows_per_s_compiled``; ``ours_to_fuxictr`` and ``compiled_to_eager``, by
        the same names without ``ours_``: median, lowest and highest ratio of a turn.
    """
    medians = {name: median(values) for name, values in rates.items()}
    ours = {name.removeprefix("ours_"): rates[name] for name in rates if name.startswith("ours_")}
    rivals = {
        name: rates[rival]
        for name in ours
        if (rival := f"fuxictr_{'ids' if name.startswith('ids') else 'texts'}") in rates
    }
    compiled = {
        name: rates[f"{_COMPILED}ours_{name}"]
        for name in ours
        if f"{_COMPILED}ours_{name}" in rates
    }
    return {
        "rows_per_s": {
            name: value for name, value in medians.items() if not name.startswith(_COMPILED)
        },
        "rows_per_s_compiled": {f"ours_{name}": median(turns) for name, turns in compiled.items()},
        "ours_to_fuxictr": {name: ratio(ours[name], turns) for name, turns in rivals.items()},
        "compiled_to_eager": {name: ratio(turns, ours[name]) for name, turns in compiled.items()},
    }


def page(figures: Mapping[str, Any]) -> str:
    """The result as Markdown.

    Args:
        figures: Of the result file.
    """
    rows = []
    for name, rate in figures["rows_per_s"].items():
        short = name.removeprefix("ours_")
        compiled = figures["rows_per_s_compiled"].get(name)
        took = figures["compile_s"].get(name)
        rows.append(
            [
                f"`{name}`",
                f"{rate:,.0f}",
                shown(figures["ours_to_fuxictr"].get(short)),
                "-" if compiled is None else f"{compiled:,.0f}",
                shown(figures["compiled_to_eager"].get(short)),
                "-" if took is None else f"{took:.0f}",
            ]
        )
    caption = (
        f"Batches of {figures['batch']:,} rows, histories of {figures['length']}, "
        f"{figures['threads']} thread; names end in the rows that share a history. Ratios: median "
        "of the turns [lowest, highest]; BAHE's and those with texts to FuxiCTR's DIN with texts. "
        f"Load of the machine: {figures['load_average_1min']:.1f}."
    )
    head = (
        *("Step", "rows/s", "to FuxiCTR's"),
        *("compiled, rows/s", "compiled to eager", "first compiled step, s"),
    )
    return f"{caption}\n\n{markdown_table(head, rows)}"


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
@click.option("--model", "models", multiple=True, type=click.Choice(list(OURS)),
              help="Of ours, alone; may be given more than once.  [default: all]")  # fmt: skip
@click.option("--ours-only", is_flag=True, help="Without FuxiCTR, where it is not installed.")
@click.option("--no-compile", is_flag=True, help="Without torch.compile.")
def main(
    batch: int,
    length: int,
    items: int,
    width: int,
    candidates: int,
    num_rounds: int,
    steps_per_turn: int,
    models: tuple[str, ...],
    ours_only: bool,
    no_compile: bool,
) -> None:
    """Measure and write the result file."""
    if batch % candidates:
        raise click.UsageError(f"--batch {batch} must be a multiple of --candidates {candidates}")
    sizes = Sizes(batch, length, items, width)
    with torch_threads(1), fresh_compile_cache():
        steps = contenders(
            sizes,
            models or tuple(OURS),
            num_candidates=candidates,
            with_fuxictr=not ours_only,
            with_compiled=not no_compile,
        )
        compile_s = compile_all(steps)
        rates = measure(steps, batch, num_rounds=num_rounds, steps_per_turn=steps_per_turn)
    figures = {
        "batch": batch,
        "length": length,
        "items": items,
        "vector_width": width,
        "id_width": ID_WIDTH,
        "text_width": TEXT_WIDTH,
        "threads": 1,
        "load_average_1min": os.getloadavg()[0],
        **compare(rates),
        "compile_s": compile_s,
        "measured_before": MEASURED_BEFORE,
        "rows_per_s_of_turns": rates,
    }
    told = page(figures)
    click.echo(told, err=True)
    result = write_result("training", given_command("bench_training"), figures, page=told)
    ratios = {key: figures[key] for key in ("ours_to_fuxictr", "compiled_to_eager")}
    click.echo(json.dumps({"result": str(result), **ratios}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)  # it tells at length where a graph breaks
    main()
