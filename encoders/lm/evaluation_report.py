"""An evaluation of language models as one HTML file."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from encoders.drawing import BROAD, COLORS, INK, svg
from encoders.lm.evaluation_documents import BitsPerByte, Evaluation, ModelFigures
from encoders.lm.intervals import NUM_REPLICATES
from encoders.lm.task_scores import Score
from encoders.page import Plot, Section, Table, write_page

_NONE = "-"
_KINDS = ("domain", "general")
_SHOWN_PROMPT, _SHOWN_ANSWER = 70, 50
"""Characters: of a prompt's end, of an answer's beginning."""


def write_report(path: Path, evaluation: Evaluation) -> None:
    """Write the page.

    Args:
        path: The HTML file.
        evaluation: Of any number of models.
    """
    models = evaluation.models
    sections = [_summary(models), _text(models)]
    if any(model.tasks for model in models):
        sections += [_tasks(models), _answers(models)]
    sections.append(_about(evaluation))
    write_page(
        path,
        title="Language models side by side",
        subtitle=f"{evaluation.dataset}, {evaluation.split} split: nothing from "
        f"{evaluation.until:%Y-%m-%d} on was to be learned from. Intervals hold 95 % of "
        f"{NUM_REPLICATES} bootstrap replicates that draw whole documents, items or users.",
        notes=[],
        sections=sections,
    )


def _summary(models: Sequence[ModelFigures]) -> Section:
    header = ["model", "weights", "vocabulary", "bits per byte, domain", "general"]
    header += ["tokens per word", "per byte", "characters/s"]
    rows = []
    for model in models:
        counted = list(model.fertility.values())
        tokens, words, size = (
            sum(getattr(one, name) for one in counted) for name in ("tokens", "words", "bytes")
        )
        speed = model.speed
        rows.append(
            [
                model.name,
                _NONE if model.num_parameters is None else f"{model.num_parameters / 1e6:,.1f} M",
                f"{model.vocab_size:,}",
                _bits(model.bits_per_byte.get("domain")),
                _bits(model.bits_per_byte.get("general")),
                f"{tokens / words:.3f}" if words else _NONE,
                f"{tokens / size:.3f}" if size else _NONE,
                f"{speed.characters_per_s:,.0f}" if speed else _NONE,
            ]
        )
    return Section(
        "Summary",
        text="Bits per byte: what a model needs to tell a text, over the text's UTF-8 bytes, so "
        "that models with different tokenizers compare; lower is better. Characters per second: "
        "all models write the same texts, one token after the other.",
        tables=[Table("One row per model", header, rows)],
    )


def _text(models: Sequence[ModelFigures]) -> Section:
    # Those of all sources of a kind come first.
    sources = sorted(models[0].bits_per_byte, key=lambda name: name not in _KINDS)
    values = [
        [model.name, *(_bits(model.bits_per_byte[source]) for source in sources)]
        for model in models
    ]
    differences = [
        [model.name, *(_difference(model.bits_per_byte[source]) for source in sources)]
        for model in models[1:]
    ]
    measured = {source: models[0].bits_per_byte[source] for source in sources}
    sizes = [
        f"{source} {one.num_documents:,} documents, {one.num_bytes:,} bytes"
        for source, one in measured.items()
    ]
    tables = [Table("Bits per byte [95 % interval]", ["model", *sources], values)]
    if differences:
        caption = f"Less those of {models[0].name} on the same documents; below 0 = better"
        tables.append(Table(caption, ["model", *sources], differences))
    plot = Plot(
        svg("bits-per-byte", _draw_bits(models, sources), width=BROAD),
        "Bits per byte by source, with intervals.",
        "Bits per byte of "
        + "; ".join(
            f"{model.name}: "
            + ", ".join(f"{name} {one.value:.3f}" for name, one in model.bits_per_byte.items())
            for model in models
        ),
        broad=True,
    )
    return Section(
        "Held-out text", text=f"Measured on: {'; '.join(sizes)}.", tables=tables, plots=[plot]
    )


def _draw_bits(
    models: Sequence[ModelFigures], sources: Sequence[str]
) -> Callable[[Sequence[Axes]], None]:
    def draw(axes: Sequence[Axes]) -> None:
        (ax,) = axes
        places = np.arange(len(sources))
        width = 0.8 / len(models)
        for number, model in enumerate(models):
            found = [model.bits_per_byte[source] for source in sources]
            heights = np.array([one.value for one in found])
            low = np.array([one.value if one.low is None else one.low for one in found])
            high = np.array([one.value if one.high is None else one.high for one in found])
            ax.bar(
                places + (number - (len(models) - 1) / 2) * width,
                heights,
                width,
                color=COLORS[number % len(COLORS)],
                label=model.name,
                yerr=np.maximum([heights - low, high - heights], 0),
                error_kw={"ecolor": INK, "capsize": 2, "linewidth": 1},
            )
        ax.set_xticks(places, sources)
        ax.set_ylabel("bits per byte")
        ax.legend()

    return draw


def _tasks(models: Sequence[ModelFigures]) -> Section:
    able = [model for model in models if model.tasks]
    exact, words = [], []
    for task, first in able[0].tasks.items():
        scores = [model.tasks[task].model for model in able]
        exact.append(
            [
                f"{task} ({first.model.num:,})",
                *map(_share, scores),
                ", ".join(f"{rule} {_percent(one.exact)}" for rule, one in first.rules.items()),
            ]
        )
        words.append(
            [
                task,
                *(_percent(one.word_f1) for one in scores),
                ", ".join(f"{rule} {_percent(one.word_f1)}" for rule, one in first.rules.items()),
            ]
        )
    new = [
        [
            f"{task} ({first.new.num:,})",
            *(_share(found) if (found := model.tasks[task].new) else _NONE for model in able),
        ]
        for task, first in able[0].tasks.items()
        if first.new
    ]
    names = [model.name for model in able]
    header = ["task (examples)", *names, "simple rules"]
    tables = [
        Table("Answers that are exactly right [95 % interval]", header, exact),
        Table("Words in common with the right answer, F1", ["task", *names, "simple rules"], words),
    ]
    if new:
        tables.append(Table("Exactly right, on items first seen after the cut", header[:-1], new))
    return Section(
        "Tasks",
        text="Items are held out by their title, baskets by time. A rule is what an answer without "
        "a model would be: the most frequent value, the nearest neighbour, the user's usual.",
        tables=tables,
    )


def _answers(models: Sequence[ModelFigures]) -> Section:
    able = [model for model in models if model.tasks]
    rows = [
        [
            first.task,
            _beginning(first.right),
            *(_beginning(model.answers[number].answer) for model in able),
            _end(first.prompt),
        ]
        for number, first in enumerate(able[0].answers)
    ]
    header = ["task", "right", *(model.name for model in able), "end of the prompt"]
    return Section("Answers", tables=[Table("The first of every task", header, rows)])


def _about(evaluation: Evaluation) -> Section:
    facts = [
        ("made", f"{evaluation.created:%Y-%m-%d %H:%M} UTC"),
        ("corpus", evaluation.corpus),
        ("examples", evaluation.examples or _NONE),
        ("revision", evaluation.git_revision or _NONE),
        *((model.name, model.folder) for model in evaluation.models if model.folder),
    ]
    return Section("What was measured", facts=facts)


def _bits(one: BitsPerByte | None) -> str:
    return _NONE if one is None else f"{one.value:.4f}{_bounds(one.low, one.high, '.4f')}"


def _difference(one: BitsPerByte) -> str:
    bounds = _bounds(one.difference_low, one.difference_high, "+.4f")
    return f"{one.difference:+.4f}{bounds}"


def _share(one: Score) -> str:
    if one.low is None or one.high is None:
        return _percent(one.exact)
    return f"{_percent(one.exact)} [{_percent(one.low)}, {_percent(one.high)}]"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _bounds(low: float | None, high: float | None, form: str) -> str:
    return "" if low is None or high is None else f" [{low:{form}}, {high:{form}}]"


def _beginning(answer: str) -> str:
    return answer if len(answer) <= _SHOWN_ANSWER else answer[:_SHOWN_ANSWER] + "…"


def _end(prompt: str) -> str:
    return prompt if len(prompt) <= _SHOWN_PROMPT else "…" + prompt[-_SHOWN_PROMPT:]
