"""Step ``lm extend``: a folder with the extended tokenizer, and on wish with its model.

Beside the tokenizer's files lie ``extension_report.json`` (:class:`ExtensionReport`) and
``report.html``. A model's folder is one like any other: ``--model FOLDER`` of every command.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import AwareDatetime

from encoders.fingerprint import model_fingerprint
from encoders.lm.corpus import CorpusManifest, load_corpus, sample_texts
from encoders.lm.extend import Appended, append_tokens, token_text
from encoders.lm.fertility import Fertility, measure, token_ids
from encoders.lm.new_embeddings import load_enlarged
from encoders.lm.records import field_texts
from encoders.lm.tokenizer_config import ExtendConfig
from encoders.lm.tokenizer_folder import TOKENIZER_FILE, find_tokenizer, read_tokenizer
from encoders.lm.tokenizer_report import FIELDS, PAGE_FILE, fertility_section, held_out_texts
from encoders.page import Section, write_page
from encoders.pretrained import quiet_transformers
from feature_repo.errors import DataSetError, EncoderError, MissingStepError, StoreError
from feature_repo.home import Home, complete_folder
from feature_repo.manifest import Document
from feature_repo.progress import Progress, silent

REPORT_FILE = "extension_report.json"
_KEPT_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
"""Of the base's folder. Not ``vocab.json`` and ``merges.txt``: tokenizer.json says the same."""
_SAMPLE_BYTES = 256_000_000
"""Of a larger source so much is read, drawn by the documents' ids."""
_USAGE_TEXTS = 2_000
"""Held-out fields in which the use of the new tokens is looked up: each against every token."""


class TokenUse(Document):
    """Whether appended tokens are used in held-out domain texts that hold their strings."""

    num_texts: int
    """Distinct fields that hold the string of at least one appended token."""
    texts_used: float
    """Share of them in which an appended token is used."""
    num_pairs: int
    """(appended token, field that holds its string)."""
    pairs_used: float
    """Share of them in which the token is used, or an appended one that it is a part of."""


class ExtensionReport(Document):
    """What a tokenizer was extended with, and what that brings on the corpus' test split."""

    format: Literal[1] = 1
    created: AwareDatetime
    fingerprint: str
    """Of all that decides the folder's contents."""
    base: str
    name: str
    corpus: str
    """Fingerprint of the corpus."""
    config: dict[str, Any]
    vocab_size_before: int
    num_appended: int
    tokens_saved: float
    """Share of the held-out domain records' tokens."""
    sources: dict[str, dict[str, Fertility]]
    """Tokenizer -> source -> figures; records' special tokens are left out, which a base lacks."""
    use: TokenUse
    model: str | None
    """Whose embeddings were enlarged."""


@dataclass(frozen=True)
class ExtensionSummary:
    """What a run of extend did."""

    folder: Path
    report: ExtensionReport


def extend_tokenizer(
    home: Home,
    base: str,
    name: str,
    config: ExtendConfig,
    *,
    model: Path | None = None,
    folder: Path | None = None,
    progress: Progress = silent,
) -> ExtensionSummary:
    """Append the domain's tokens to a tokenizer, and give a model rows for them.

    Where just that is there already, nothing is done.

    Args:
        home: The corpus has been built; its domain sources are learned from.
        base: Name of a tokenizer of the home, or a folder with ``tokenizer.json``.
        name: Of the result.
        config: How many tokens.
        model: Folder of the model that the base is the tokenizer of; None: the tokenizer alone.
        folder: Made by this. None: ``home.models/<name>`` with a model, else
            ``home.tokenizers/<name>``.
        progress: Told documents read.

    Raises:
        MissingStepError: If there is no corpus, or it is of other tables.
        DataSetError: If the corpus has no domain text.
        EncoderError: If the base is no byte-level BPE, the model does not fit it, or the folder
            holds something else.
    """
    corpus = load_corpus(home)
    old_folder = find_tokenizer(home, base)
    if folder is None:
        folder = (home.tokenizers if model is None else home.models) / name
    folder = folder.expanduser().resolve()
    old = read_tokenizer(old_folder)
    # As it is loaded: some classes of transformers replace parts of what the file says.
    text = old.backend_tokenizer.to_str()
    kept = sorted(path for pattern in _KEPT_FILES for path in old_folder.glob(pattern))
    fingerprint = _fingerprint(text, kept, corpus, config, model)
    there = _there(folder, fingerprint)
    if there is not None:
        return ExtensionSummary(folder, there)
    with home.lock(f"extend-{name}"):
        extension = append_tokens(json.loads(text), _domain_texts(home, corpus, progress), config)
        with complete_folder(folder) as part:
            for path in kept:
                shutil.copy(path, part / path.name)
            content = json.dumps(extension.content, ensure_ascii=False)
            (part / TOKENIZER_FILE).write_text(content, encoding="utf-8")
            if model is not None:
                enlarged = load_enlarged(model, len(old), extension.appended)
                with quiet_transformers():
                    enlarged.save_pretrained(part)
            new = read_tokenizer(part)
            report = _report(home, corpus, old, new, extension.appended, name=name, base=base,
                             config=config, model=model, fingerprint=fingerprint)  # fmt: skip
            report.save(part / REPORT_FILE)
            _write_page(part / PAGE_FILE, report)
    return ExtensionSummary(folder, report)


def token_use(tokenizer: Any, appended: Sequence[Appended], texts: Sequence[str]) -> TokenUse:
    """Look up appended tokens in texts, as strings and as tokens."""
    strings = {token.token: text for token in appended if (text := token_text(token.token))}
    names = {token.token_id: token.token for token in appended}
    num_texts = texts_used = num_pairs = pairs_used = 0
    for text, ids in zip(texts, token_ids(tokenizer, texts), strict=True):
        there = [token for token, string in strings.items() if string in text]
        used = [names[i] for i in ids if i in names]
        num_texts += bool(there)
        texts_used += bool(there and used)
        num_pairs += len(there)
        pairs_used += sum(any(token in longer for longer in used) for token in there)
    return TokenUse(
        num_texts=num_texts,
        texts_used=texts_used / num_texts if num_texts else 1.0,
        num_pairs=num_pairs,
        pairs_used=pairs_used / num_pairs if num_pairs else 1.0,
    )


def _fingerprint(
    base: str,
    kept: Sequence[Path],
    corpus: CorpusManifest,
    config: ExtendConfig,
    model: Path | None,
) -> str:
    """Of all that decides an extension: the base as text and its other files, text, settings."""
    identity = [
        *(base, [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in kept]),
        *(corpus.fingerprint, asdict(config)),
        None if model is None else model_fingerprint(model),
    ]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def _there(folder: Path, fingerprint: str) -> ExtensionReport | None:
    """What a run before this one has finished; None where there is nothing.

    Raises:
        EncoderError: If it is something else.
    """
    if not folder.exists():
        return None
    try:
        report = ExtensionReport.load(folder / REPORT_FILE, made_by="longtrail lm extend")
    except (MissingStepError, StoreError):  # of another command, or of another version
        report = None
    if report is None or report.fingerprint != fingerprint:
        raise EncoderError(
            f"{folder} exists already, made from another base, corpus or settings: give another "
            "--name, or delete it"
        )
    return report


def _domain_texts(home: Home, corpus: CorpusManifest, progress: Progress) -> Iterator[str]:
    domain = {name: found for name, found in corpus.sources.items() if found.kind == "domain"}
    if not any(summary.train_bytes for summary in domain.values()):
        raise DataSetError(
            "the corpus has no domain text to learn tokens from: build it with domain sources "
            "(`longtrail lm corpus`)"
        )
    total = sum(summary.splits["train"].documents for summary in domain.values())
    for name in domain:
        for text in sample_texts(home, "train", name, _SAMPLE_BYTES):
            yield from field_texts(text)
            progress(1, total)


def _report(
    home: Home,
    corpus: CorpusManifest,
    old: Any,
    new: Any,
    appended: Sequence[Appended],
    *,
    name: str,
    base: str,
    config: ExtendConfig,
    model: Path | None,
    fingerprint: str,
) -> ExtensionReport:
    parts = {
        part: [field for text in texts for field in field_texts(text)]
        for part, texts in held_out_texts(home, corpus).items()
    }
    before = {part: measure(old, texts) for part, texts in parts.items()}
    after = {part: measure(new, texts) for part, texts in parts.items()}
    domain = [part for part in parts if part in corpus.sources]
    domain = [part for part in domain if corpus.sources[part].kind == "domain"]
    num_before = sum(before[part].tokens for part in domain)
    num_after = sum(after[part].tokens for part in domain)
    return ExtensionReport(
        created=datetime.now(UTC),
        fingerprint=fingerprint,
        base=base,
        name=name,
        corpus=corpus.fingerprint,
        config=asdict(config),
        vocab_size_before=len(old),
        num_appended=len(appended),
        tokens_saved=1 - num_after / num_before if num_before else 0.0,
        sources={name: after, f"{base} (base)": before},
        use=token_use(new, appended, parts.get(FIELDS, [])[:_USAGE_TEXTS]),
        model=None if model is None else str(model),
    )


def _write_page(path: Path, report: ExtensionReport) -> None:
    facts = [
        ("base", f"{report.base}, {report.vocab_size_before:,} tokens"),
        ("appended", f"{report.num_appended:,}"),
        ("tokens of domain text saved", f"{report.tokens_saved:.1%}"),
        (
            "appended tokens are used",
            (
                f"in {report.use.texts_used:.1%} of {report.use.num_texts:,} held-out fields that "
                f"hold one of them; {report.use.pairs_used:.1%} of {report.use.num_pairs:,} pairs "
                "of token and field"
            ),
        ),
        ("model", report.model or "none: the tokenizer alone"),
        ("made", f"{report.created:%Y-%m-%d %H:%M} UTC"),
        ("corpus", report.corpus),
        ("settings", ", ".join(f"{key} = {value}" for key, value in report.config.items())),
    ]
    write_page(
        path,
        title=f"Extended tokenizer {report.name}",
        subtitle="Held-out text: fields of the corpus' test split.",
        notes=[],
        sections=[
            fertility_section("Before and after", report.name, report.sources),
            Section("The extension", facts=facts),
        ],
    )
