"""What a tokenizer makes of held-out text, beside others: JSON for programs, a page for people.

Others are given the records' special tokens as well: no tokenizer is better only because it knows
the templates.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from pydantic import AwareDatetime

from encoders.config import DEFAULT_MODEL
from encoders.drawing import BROAD, COLORS, svg
from encoders.lm.corpus import CorpusManifest, sample_texts
from encoders.lm.fertility import Fertility, measure, token_ids, tokens_saved
from encoders.lm.language import LanguageLabels
from encoders.lm.records import field_texts
from encoders.page import Plot, Section, Table, write_page
from encoders.pretrained import load_tokenizer
from feature_repo.home import Home
from feature_repo.manifest import Document

REPORT_FILE = "tokenizer_report.json"
PAGE_FILE = "report.html"
FIELDS = "domain fields, each once"
"""A part of its own: orders repeat what sells, so they say little of rare and new texts."""
MEASURED_BYTES = 1_000_000
"""Of held-out text per source, drawn by the documents' ids: a second of work, and with it the
figures move by less than a hundredth."""


class TokenizerReport(Document):
    """What a tokenizer was made from, and what it makes of the corpus' test split."""

    format: Literal[1] = 1
    created: AwareDatetime
    fingerprint: str
    """Of the corpus' sources, its special tokens and the settings."""
    name: str
    corpus: str
    """Fingerprint of the corpus."""
    config: dict[str, Any]
    vocab_size: int
    """Reached; less than asked for where no pair of tokens was frequent enough."""
    num_special: int
    num_phrases: int
    """Tokens that join what words would keep apart, or rare words' pieces."""
    num_unused: int
    """Tokens in no training text: steps on the way to longer ones, and bytes that never come."""
    coverage: float
    """Share of the held-out text's bytes that are written with tokens of several bytes."""
    sources: dict[str, dict[str, Fertility]]
    """Tokenizer -> source, or :data:`FIELDS` -> figures; this one is called by its name."""
    languages: dict[str, dict[str, Fertility]]
    """Tokenizer -> language of free text -> figures."""


def write_report(
    home: Home,
    corpus: CorpusManifest,
    tokenizer: Any,
    folder: Path,
    *,
    name: str,
    fingerprint: str,
    config: dict[str, Any],
    num_phrases: int,
    texts: Counter[str],
) -> TokenizerReport:
    """Measure a tokenizer on the test split, and write both files into its folder.

    Args:
        home: With the corpus.
        corpus: Its manifest.
        tokenizer: Of transformers.
        folder: Where to write.
        name: The tokenizer's.
        fingerprint: Of what it was made from.
        config: As it was made.
        num_phrases: Merges that were learned across words.
        texts: What it was trained on, for the unused tokens.
    """
    held_out = held_out_texts(home, corpus)
    tokenizers = {name: tokenizer} | reference_tokenizers(corpus.special_tokens)
    languages = _by_language(corpus, held_out)
    report = TokenizerReport(
        created=datetime.now(UTC),
        fingerprint=fingerprint,
        name=name,
        corpus=corpus.fingerprint,
        config=config,
        vocab_size=len(tokenizer),
        num_special=len(corpus.special_tokens),
        num_phrases=num_phrases,
        num_unused=_num_unused(tokenizer, texts),
        coverage=_coverage(tokenizer, [text for part in held_out.values() for text in part]),
        sources=_measured(tokenizers, held_out),
        languages=_measured(tokenizers, languages),
    )
    report.save(folder / REPORT_FILE)
    write_tokenizer_page(folder / PAGE_FILE, report)
    return report


def held_out_texts(home: Home, corpus: CorpusManifest) -> dict[str, list[str]]:
    """Documents of the test split by source, at most about :data:`MEASURED_BYTES` of each.

    The part :data:`FIELDS` has every distinct field of the domain records among them that holds
    letters. Sources without documents are left out.
    """
    parts: dict[str, list[str]] = {}
    fields: dict[str, None] = {}
    for source, summary in corpus.sources.items():
        chosen = list(sample_texts(home, "test", source, MEASURED_BYTES))
        if chosen:
            parts[source] = chosen
        if summary.kind == "domain":
            fields |= dict.fromkeys(field for text in chosen for field in field_texts(text))
    words = [field for field in fields if any(map(str.isalpha, field))]
    return parts | ({FIELDS: words} if words else {})


def reference_tokenizers(special_tokens: Sequence[str]) -> dict[str, Any]:
    """The default model's tokenizer, where it is installed, with the records' tokens added."""
    if find_spec(DEFAULT_MODEL.replace("-", "_")) is None:
        return {}
    reference = load_tokenizer(DEFAULT_MODEL)
    reference.add_tokens(list(special_tokens), special_tokens=True)
    return {DEFAULT_MODEL: reference}


def _measured(
    tokenizers: Mapping[str, Any], parts: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Fertility]]:
    return {
        name: {part: measure(tokenizer, texts) for part, texts in parts.items()}
        for name, tokenizer in tokenizers.items()
    }


def _by_language(
    corpus: CorpusManifest, held_out: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Free text by language, the most frequent first."""
    free = [name for name, summary in corpus.sources.items() if summary.languages]
    if not free:
        return {}
    label = LanguageLabels()
    found: dict[str, list[str]] = {}
    for name in free:
        for text in held_out.get(name, ()):
            found.setdefault(label(text), []).append(text)
    return dict(sorted(found.items(), key=lambda entry: -len(entry[1])))


def _num_unused(tokenizer: Any, texts: Counter[str]) -> int:
    used = {token for ids in token_ids(tokenizer, list(texts)) for token in ids}
    used |= set(tokenizer.all_special_ids)
    return len(tokenizer) - len(used)


def _coverage(tokenizer: Any, texts: Sequence[str]) -> float:
    """In the byte-level alphabet, a token has one character per byte."""
    special = set(tokenizer.all_special_ids)
    lengths = {i: len(token) for token, i in tokenizer.get_vocab().items() if i not in special}
    counts = Counter(token for ids in token_ids(tokenizer, texts) for token in ids)
    total = sum(lengths.get(token, 0) * count for token, count in counts.items())
    single = sum(count for token, count in counts.items() if lengths.get(token) == 1)
    return 1 - single / total if total else 1.0


def write_tokenizer_page(path: Path, report: TokenizerReport) -> None:
    """Write the page for people."""
    facts = [
        ("tokens", f"{report.vocab_size:,}"),
        ("special tokens", f"{report.num_special:,}"),
        ("phrases", f"{report.num_phrases:,}"),
        ("in no training text", f"{report.num_unused:,}"),
        ("bytes in tokens of several", f"{report.coverage:.2%}"),
        ("made", f"{report.created:%Y-%m-%d %H:%M} UTC"),
        ("corpus", report.corpus),
        ("settings", ", ".join(f"{key} = {value}" for key, value in report.config.items())),
    ]
    sections = [
        fertility_section("By source", report.name, report.sources),
        *(
            [fertility_section("Free text by language", report.name, report.languages)]
            if any(report.languages.values())
            else []
        ),
        Section("The tokenizer", facts=facts),
    ]
    write_page(
        path,
        title=f"Tokenizer {report.name}",
        subtitle="Held-out text: the corpus' test split. All tokenizers have the records' special "
        "tokens.",
        notes=[],
        sections=sections,
    )


def fertility_section(
    title: str, name: str, figures: Mapping[str, Mapping[str, Fertility]]
) -> Section:
    """A table and a plot of one tokenizer beside others.

    Args:
        title: Of the section.
        name: The tokenizer that the others are compared with.
        figures: Tokenizer -> part of the text -> figures; all have the same parts.
    """
    own = figures[name]
    others = {other: parts for other, parts in figures.items() if other != name}
    header = ["text", "bytes", "words", "tokens", "per word", "per byte"]
    header += [column for other in others for column in (f"of {other}", "saved")]
    rows = []
    for part, found in own.items():
        row = [part, f"{found.bytes:,}", f"{found.words:,}", f"{found.tokens:,}"]
        row += [f"{found.tokens_per_word:.3f}", f"{found.tokens_per_byte:.4f}"]
        for parts in others.values():
            row += [f"{parts[part].tokens:,}", f"{tokens_saved(found, parts[part]):.1%}"]
        rows.append(row)
    alt = "; ".join(
        f"{other}: " + ", ".join(f"{p} {f.tokens_per_byte:.3f}" for p, f in parts.items())
        for other, parts in figures.items()
    )
    plot = Plot(
        svg(f"fertility-{title}", _bars(figures), width=BROAD),
        "Tokens per byte: fewer are faster to read and to write.",
        f"Tokens per byte. {alt}",
        broad=True,
    )
    return Section(title, tables=[Table("Tokens of held-out text", header, rows)], plots=[plot])


def _bars(figures: Mapping[str, Mapping[str, Fertility]]) -> Callable[[Sequence[Axes]], None]:
    def draw(axes: Sequence[Axes]) -> None:
        (ax,) = axes
        width = 0.8 / len(figures)
        for place, (name, parts) in enumerate(figures.items()):
            x = [part + (place - (len(figures) - 1) / 2) * width for part in range(len(parts))]
            values = [found.tokens_per_byte for found in parts.values()]
            ax.bar(x, values, width, color=COLORS[place % len(COLORS)], label=name)
        names = list(next(iter(figures.values())))
        ax.set_xticks(range(len(names)), names)
        ax.set_ylabel("tokens per byte")
        ax.legend()

    return draw
