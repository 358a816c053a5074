"""A training step of BAHE against one of the language model over the full text.

From the project's root: ``python -m benchmarks.bench_bahe_vs_full_text`` (CPU) or, with a
1-billion-parameter backbone on a GPU, ``--device cuda --backbone 1b``. What a step is:
:mod:`benchmarks.efficiency_cases`.

Each contender lives in a process of its own, so that its peak memory is its own; the processes take
their steps in turn, so that noise of the machine hits all, and time ratios are medians of the
turns. The paper does not give its split point: BAHE is measured with a deep half of a quarter and
of half of the layers, the first is the headline. Encoding each distinct text once is BAHE's price;
it is timed and added per step beside the plain ratio. Rows per day are BAHE's in larger batches, at
the last length. Beside them stands what one H200 would do by counts of operations, with the
assumptions that this rests on.

1.1 billion parameters take 18 GB with their optimiser; with ``--contexts 8`` the full text at 2048
tokens takes some 80 GB more.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

from benchmarks.efficiency_cases import (
    BACKBONES,
    Backbone,
    Case,
    encode_seconds_per_text,
    peak_flops_per_s,
    serve,
)
from benchmarks.results_file import given_command, markdown_table, write_result
from benchmarks.turns import ratio, shown

DEEP_SHARES = (4, 2)
"""One in so many layers is BAHE's deep half; the first is the headline."""
TARGET = {"num_tokens": 2048, "time_ratio": 20.0, "memory_ratio": 10.0}
PAPER = {"time_ratio": 5.66, "memory_ratio": 5.98, "rows_per_day_on_8_a100": 50_000_000}
H200_BFLOAT16_FLOPS_PER_S = 989e12
"""Dense, by its data sheet."""
ASSUMED_SHARE = 0.3
"""Of that, what training of short sequences reaches: an assumption, not a measurement."""
QUIET_PAUSE_S = 0.3
"""Before each turn: threads of the process that had the last one wait actively for a moment."""
SECONDS_PER_DAY = 86_400
_SPAWN = multiprocessing.get_context("spawn")


class Contender:
    """A case's process; use it as a context manager.

    Args:
        case: What it measures.
        process: Starts :func:`benchmarks.efficiency_cases.serve`; tests pass one that is a thread.
    """

    def __init__(self, case: Case, process: Callable[..., Any] = _SPAWN.Process) -> None:
        self.case = case
        self.seconds: list[float] = []
        self._connection, other = _SPAWN.Pipe()
        self._process = process(target=serve, args=(case, other))
        self._process.daemon = True

    def __enter__(self) -> "Contender":
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(BrokenPipeError):  # it may have ended already, and said why on stderr
            self._connection.send("stop")
        self._process.join()

    def ask(self, message: str) -> Any:
        """Send ``step`` or ``memory`` and wait for the answer.

        Raises:
            ClickException: If the process has ended, as it does when memory runs out.
        """
        self._connection.send(message)
        while not self._connection.poll(1.0):
            if not self._process.is_alive():
                raise click.ClickException(
                    f"the process of {self.case.method} at {self.case.num_tokens} tokens ended: "
                    "see above; if memory ran out, lower --contexts"
                )
        return self._connection.recv()

    def figures(self, limit_flops_per_s: float) -> dict[str, Any]:
        """Seconds, bytes and share of the machine's limit."""
        memory, seconds = self.ask("memory"), median(self.seconds)
        flops = self.case.step_flops()
        rows = self.case.num_contexts * self.case.num_candidates
        return {
            "num_layers": self.case.num_layers,
            "step_s": seconds,
            "step_s_all": self.seconds,
            "peak_bytes": memory["peak"],
            "state_bytes": memory["state"],
            "activation_bytes": max(0, memory["peak"] - memory["state"]),
            "process_peak_bytes": memory["process_peak"],
            "step_flops": flops,
            "flops_per_s": flops / seconds,
            "share_of_limit": flops / seconds / limit_flops_per_s,
            "rows_per_s": rows / seconds,
            "rows_per_day": rows / seconds * SECONDS_PER_DAY,
        }


def bahe_of(full: Case, share: int) -> Case:
    """BAHE's case on the same batch: one in ``share`` layers is its deep half."""
    num_layers = max(1, round(full.backbone.num_layers / share))
    return replace(full, method="bahe", num_layers=num_layers)


def measure_length(
    full: Case,
    num_steps: int,
    limit_flops_per_s: float,
    process: Callable[..., Any] = _SPAWN.Process,
) -> dict[str, Any]:
    """Let the full text and BAHE's variants take steps in turn at one length.

    Args:
        full: The full text's case; BAHE's have its sizes.
        num_steps: Measured steps of each, after one that is not.
        limit_flops_per_s: Of :func:`benchmarks.efficiency_cases.peak_flops_per_s`.
        process: See :class:`Contender`.

    Returns:
        One row of the result file.
    """
    with ExitStack() as stack:
        contenders = {"full_text": stack.enter_context(Contender(full, process))}
        for share in DEEP_SHARES:
            one = Contender(bahe_of(full, share), process)
            contenders[f"bahe_1_{share}"] = stack.enter_context(one)
        for turn in range(num_steps + 1):
            for name, contender in contenders.items():
                time.sleep(QUIET_PAUSE_S)
                seconds = contender.ask("step")
                if turn:
                    contender.seconds.append(seconds)
                click.echo(f"{full.num_tokens} tokens, {name}: {seconds:.3f} s", err=True)
        found = {name: c.figures(limit_flops_per_s) for name, c in contenders.items()}
    whole, headline = found["full_text"], found[f"bahe_1_{DEEP_SHARES[0]}"]
    of_turns = ratio(whole["step_s_all"], headline["step_s_all"])
    return {
        "num_tokens": full.num_tokens,
        "num_behaviors": full.num_behaviors,
        "full_text_s": whole["step_s"],
        "bahe_s": headline["step_s"],
        "time_ratio": of_turns["median"],
        "time_ratio_of_turns": of_turns,
        "full_text_bytes": whole["peak_bytes"],
        "bahe_bytes": headline["peak_bytes"],
        "memory_ratio": whole["peak_bytes"] / headline["peak_bytes"],
        "activation_ratio": whole["activation_bytes"] / max(1, headline["activation_bytes"]),
        "flops_ratio": whole["step_flops"] / headline["step_flops"],
        **found,
    }


def measure_throughput(
    bahe: Case,
    num_steps: int,
    limit_flops_per_s: float,
    process: Callable[..., Any] = _SPAWN.Process,
) -> dict[str, Any]:
    """BAHE alone, in batches of its own size: what it fits in memory is part of its gain."""
    with Contender(bahe, process) as contender:
        contender.ask("step")
        contender.seconds = [contender.ask("step") for _ in range(num_steps)]
        return {"contexts": bahe.num_contexts, **contender.figures(limit_flops_per_s)}


def add_encoding(
    row: dict[str, Any],
    seconds_per_text: dict[int, float],
    num_texts: int,
    num_contexts: int,
    case: Case,
) -> None:
    """Add what encoding every distinct text once costs per step, and the ratio with it.

    Args:
        row: Of :func:`measure_length`.
        seconds_per_text: Of the shallow half, by the share of deep layers.
        num_texts: Distinct texts of the data set.
        num_contexts: Histories learned from, all epochs together.
        case: Any case of the row.
    """
    whole_s = row["full_text"]["step_s_all"]
    for share in DEEP_SHARES:
        bahe = row[f"bahe_1_{share}"]
        per_step = seconds_per_text[share] * num_texts * case.num_contexts / num_contexts
        bahe["encoding_s_per_step"] = per_step
        bahe["time_ratio"] = ratio(whole_s, bahe["step_s_all"])["median"]
        with_encoding = ratio(whole_s, [seconds + per_step for seconds in bahe["step_s_all"]])
        bahe["time_ratio_with_encoding"] = with_encoding["median"]
        bahe["memory_ratio"] = row["full_text_bytes"] / bahe["peak_bytes"]
    headline = row[f"bahe_1_{DEEP_SHARES[0]}"]
    row["time_ratio_with_encoding"] = headline["time_ratio_with_encoding"]


def project(case: Case) -> dict[str, Any]:
    """What one H200 would learn from in a day at the paper's length, from counts of operations.

    Args:
        case: Gives behaviours' tokens and candidates per history.
    """
    backbone, num_tokens = BACKBONES["1b"], int(TARGET["num_tokens"])
    full = replace(
        case,
        method="full_text",
        backbone=backbone,
        num_layers=backbone.num_layers,
        num_behaviors=max(1, num_tokens // case.tokens_per_behavior),
        num_contexts=1,
    )
    bahe, rate = bahe_of(full, DEEP_SHARES[0]), H200_BFLOAT16_FLOPS_PER_S * ASSUMED_SHARE

    def rows_per_day(one: Case) -> float:
        return rate / (one.step_flops() / one.num_candidates) * SECONDS_PER_DAY

    return {
        "assumptions": (
            f"1.1 billion parameters, {full.num_tokens} tokens = {full.num_behaviors} behaviours, "
            f"{case.num_candidates} rows per history, deep half of {bahe.num_layers} of "
            f"{backbone.num_layers} layers, {ASSUMED_SHARE:.0%} of "
            f"{H200_BFLOAT16_FLOPS_PER_S / 1e12:.0f} bfloat16 TFLOP/s, data never waited for"
        ),
        "bahe_rows_per_day": rows_per_day(bahe),
        "full_text_rows_per_day": rows_per_day(full),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    head = (
        *("Tokens", "Behaviours", "Full text, s", "BAHE, s", "Times less time [turns]"),
        *("with encoding", "Full text, MiB", "BAHE, MiB", "Times less memory"),
        *("Full text, share of limit", "BAHE, share of limit"),
    )
    headline = f"bahe_1_{DEEP_SHARES[0]}"
    cells = [
        [
            str(row["num_tokens"]),
            str(row["num_behaviors"]),
            f"{row['full_text_s']:.3f}",
            f"{row['bahe_s']:.4f}",
            shown(row["time_ratio_of_turns"], digits=1),
            f"{row['time_ratio_with_encoding']:.1f}",
            f"{row['full_text_bytes'] / 2**20:.0f}",
            f"{row['bahe_bytes'] / 2**20:.0f}",
            f"{row['memory_ratio']:.1f}",
            *(f"{row[name]['share_of_limit']:.0%}" for name in ("full_text", headline)),
        ]
        for row in rows
    ]
    return markdown_table(head, cells)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw time and memory of a step against the text's length."""
    from matplotlib.figure import Figure  # slow to import, and needed at the end only

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    lengths = [row["num_tokens"] for row in rows]
    labels = {"full_text": "full text, all layers"}
    labels |= {f"bahe_1_{share}": f"BAHE, 1/{share} of the layers" for share in DEEP_SHARES}
    for axes, key, unit, title in (
        (panels[0], "step_s", 1.0, "seconds per step"),
        (panels[1], "peak_bytes", 2.0**20, "peak MiB"),
    ):
        for name, label in labels.items():
            axes.plot(lengths, [row[name][key] / unit for row in rows], marker="o", label=label)
        axes.set(xscale="log", yscale="log", xlabel="tokens of a history", title=title)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path)


def hardware_part(device: str) -> str:
    """What the result file's name says beside the processor."""
    if device != "cuda":
        return "efficiency"
    return "efficiency_" + torch.cuda.get_device_name().lower().replace(" ", "-")


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--backbone", "backbone_name", type=click.Choice(sorted(BACKBONES)), default="small",
    show_default=True, help="The language model's sizes; 1b has 1.1 billion parameters.",
)  # fmt: skip
@click.option(
    "--length", "lengths", type=click.IntRange(min=2), multiple=True,
    default=(256, 512, 1024, 2048), show_default=True, help="Tokens of a history.",
)  # fmt: skip
@click.option("--tokens-per-behavior", type=click.IntRange(min=2), default=16, show_default=True)
@click.option("--contexts", type=click.IntRange(min=1), default=16, show_default=True,
              help="Histories per step.")  # fmt: skip
@click.option("--throughput-contexts", type=click.IntRange(min=1), default=64, show_default=True,
              help="Histories per step where BAHE's rows per day are measured.")  # fmt: skip
@click.option("--candidates", type=click.IntRange(min=1), default=4, show_default=True,
              help="Rows per history; they share its pass.")  # fmt: skip
@click.option("--steps", "num_steps", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=os.cpu_count(), show_default=True)
@click.option("--precision", type=click.Choice(["bfloat16", "float32"]), default="bfloat16",
              show_default=True)  # fmt: skip
@click.option("--gradient-checkpointing", is_flag=True, help="In both.")
@click.option("--distinct-texts", type=click.IntRange(min=1), default=5345, show_default=True,
              help="Of the data set that encoding is paid for; Online Retail II's.")  # fmt: skip
@click.option("--histories", type=click.IntRange(min=1), default=3 * 17_573, show_default=True,
              help="Learned from, all epochs together; Online Retail II's in three.")  # fmt: skip
def main(**options: Any) -> None:
    """Measure and write the result file, its page and its plot."""
    result = run(**options)
    click.echo(json.dumps({"result": str(result)}))


def run(
    *,
    device: str,
    backbone_name: str,
    lengths: tuple[int, ...],
    tokens_per_behavior: int,
    contexts: int,
    throughput_contexts: int,
    candidates: int,
    num_steps: int,
    threads: int,
    precision: str,
    gradient_checkpointing: bool,
    distinct_texts: int,
    histories: int,
) -> Path:
    """See the options of :func:`main`; returns the result file."""
    torch.set_num_threads(threads)
    backbone: Backbone = BACKBONES[backbone_name]
    bfloat16 = precision == "bfloat16"
    limit = peak_flops_per_s(device, use_bfloat16=bfloat16, size=8192 if device == "cuda" else 2048)
    seconds_per_text = {
        share: encode_seconds_per_text(
            backbone,
            max(1, backbone.num_layers - round(backbone.num_layers / share)),
            tokens_per_behavior,
            device,
            use_bfloat16=bfloat16,
        )
        for share in DEEP_SHARES
    }
    rows = []
    for length in lengths:
        case = Case(
            method="full_text",
            backbone=backbone,
            num_layers=backbone.num_layers,
            num_behaviors=max(1, length // tokens_per_behavior),
            tokens_per_behavior=tokens_per_behavior,
            num_contexts=contexts,
            num_candidates=candidates,
            device=device,
            threads=threads,
            use_bfloat16=bfloat16,
            gradient_checkpointing=gradient_checkpointing,
        )
        row = measure_length(case, num_steps, limit)
        add_encoding(row, seconds_per_text, distinct_texts, histories, case)
        rows.append(row)
    alone = replace(bahe_of(case, DEEP_SHARES[0]), num_contexts=throughput_contexts)
    throughput = measure_throughput(alone, num_steps, limit)
    projection = project(case)
    result = write_result(
        hardware_part(device),
        given_command("bench_bahe_vs_full_text"),
        {
            "target": TARGET,
            "paper": PAPER,
            "backbone": vars(backbone),
            "device": device,
            "precision": precision,
            "threads": threads,
            "contexts": contexts,
            "candidates": candidates,
            "tokens_per_behavior": tokens_per_behavior,
            "gradient_checkpointing": gradient_checkpointing,
            "limit_flops_per_s": limit,
            "encoding": {
                "distinct_texts": distinct_texts,
                "histories": histories,
                "texts_per_s": {f"1_{s}": 1 / t for s, t in seconds_per_text.items()},
                "tokens_per_s": {
                    f"1_{s}": tokens_per_behavior / t for s, t in seconds_per_text.items()
                },
                "seconds": {f"1_{s}": t * distinct_texts for s, t in seconds_per_text.items()},
            },
            "bahe_throughput": throughput,
            "projection_to_one_h200": projection,
            "load_average_1min": os.getloadavg()[0],
            "rows": rows,
        },
    )
    picture, page = result.with_suffix(".svg"), result.with_suffix(".md")
    plot(rows, picture)
    figures = page.read_text(encoding="utf-8")
    page.write_text(f"{table(rows)}\n\n![]({picture.name})\n\n{figures}", encoding="utf-8")
    click.echo(
        f"on one H200: {projection['bahe_rows_per_day']:.3g} rows a day with BAHE, "
        f"{projection['full_text_rows_per_day']:.3g} with the full text, if "
        + projection["assumptions"],
        err=True,
    )
    return result


if __name__ == "__main__":
    main()
