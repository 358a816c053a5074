"""Sources of text that lie in files: parquet, JSONL and text, and Python's own documentation."""

import ast
import io
import json
import platform
import re
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from glob import glob
from pathlib import Path
from typing import Any, TextIO, cast, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from encoders.lm.built_in_sources import PYTHON_DOCS
from encoders.lm.corpus import SourceKind
from encoders.lm.sources import RawDocument, Source
from feature_repo.errors import DataSetError

PIECE_CHARACTERS = 20_000
"""A longer text is cut into several documents, at the end of a line where there is one."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
"""Folders of the standard library that are not its documentation."""
_HOLD_DEFINITIONS = (ast.stmt, ast.ExceptHandler, ast.match_case)
_LINES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class FileSource:
    """Files of text that a user names.

    Parquet and JSON lines have their text in a column of its own, and may have times; every other
    file is text, one document.

    Raises:
        DataSetError: If the name or the kind cannot be used.
    """

    name: str
    """Lower-case letters, digits, ``_`` and ``-``."""
    kind: SourceKind
    pattern: str
    """Path with ``*`` and ``**``."""
    text_column: str = "text"
    time_column: str = "time"
    """Timestamps, or ISO 8601 strings; without zone they are UTC. May be missing."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise DataSetError(
                f"the name of a source is made of lower-case letters, digits, _ and -, got "
                f"{self.name!r}"
            )
        if self.kind not in get_args(SourceKind):
            raise DataSetError(
                f"source {self.name} must be of the kind {' or '.join(get_args(SourceKind))}, got "
                f"{self.kind!r}"
            )


def parse_source(text: str, *, text_column: str, time_column: str) -> FileSource:
    """Files as the command line names them: ``NAME=KIND:PATTERN``.

    Raises:
        DataSetError: If it is not of this form.
    """
    name, equals, rest = text.partition("=")
    kind, colon, pattern = rest.partition(":")
    if not (equals and colon and pattern):
        raise DataSetError(
            f"a source is named as NAME=KIND:GLOB, such as reviews=domain:'reviews/*.jsonl', got "
            f"{text!r}"
        )
    return FileSource(name, cast(SourceKind, kind), pattern, text_column, time_column)


def file_source(config: FileSource) -> Source:
    """The source of a user's files.

    Raises:
        DataSetError: If the pattern matches no file. The stream raises it where a file cannot be
            read as what it is named.
    """
    found = glob(config.pattern, recursive=True)  # noqa: PTH207  # absolute patterns too
    files = [path for path in map(Path, sorted(found)) if path.is_file()]
    if not files:
        raise DataSetError(
            f"source {config.name}: no file matches {config.pattern}: expected parquet, JSONL or "
            "text files; check the path, and quote patterns for the shell"
        )

    def read() -> Iterator[RawDocument]:
        for path in files:
            if path.suffix == ".parquet":
                yield from _parquet(path, config)
            elif path.suffix in _LINES:
                yield from _json_lines(path, config)
            else:
                yield from ((text, None) for text in _text(path))

    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return Source(
        name=config.name,
        kind=config.kind,
        origin=f"{len(files)} files: {config.pattern}",
        is_record=False,
        deduplicate=True,
        identity=[states, config.text_column, config.time_column],
        read=read,
    )


def python_docs() -> Source:
    """General English that every machine has: the standard library's documentation strings."""
    version = platform.python_version()
    return Source(
        name=PYTHON_DOCS,
        kind="general",
        origin=f"documentation strings of Python {version}'s standard library",
        is_record=False,
        deduplicate=True,
        identity=version,
        read=_documentation_strings,
    )


def _documentation_strings() -> Iterator[RawDocument]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if _LEFT_OUT & set(path.relative_to(library).parts):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                module = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates that only look like modules
            continue
        nodes: deque[ast.AST] = deque([module])
        while nodes:
            node = nodes.popleft()
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield text, None
            # No definition is within an expression: ast.walk would take four times as long.
            nodes += [n for n in ast.iter_child_nodes(node) if isinstance(n, _HOLD_DEFINITIONS)]


def pieces(file: TextIO, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """A long text in parts of at most ``size`` characters, cut at lines, words or anywhere."""
    rest = ""
    while True:
        rest += file.read(size - len(rest))
        if len(rest) < size:
            if rest:
                yield rest
            return
        cut = max(rest.rfind("\n"), 0) or max(rest.rfind(" "), 0) or size
        yield rest[:cut]
        rest = rest[cut:]


def _text(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        try:
            for piece in pieces(file):
                if "\0" in piece:
                    raise _binary(path)
                yield piece
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from error


def _json_lines(path: Path, config: FileSource) -> Iterator[RawDocument]:
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if "\0" in line:
                    raise _binary(path)
                if not line.strip():
                    continue
                place = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataSetError(
                        f"{place} is not JSON ({error}): expected one object a line"
                    ) from error
                if not isinstance(row, dict) or not isinstance(row.get(config.text_column), str):
                    raise DataSetError(
                        f"{place} has no string {config.text_column!r}: expected an object such as "
                        f'{{"{config.text_column}": "..."}}; name the column with --text-column'
                    )
                yield from _cut(row[config.text_column], row.get(config.time_column), place)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from error


def _parquet(path: Path, config: FileSource) -> Iterator[RawDocument]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise DataSetError(f"{path} cannot be read as parquet: {error}") from error
    with file:
        names = file.schema_arrow.names
        if config.text_column not in names:
            raise DataSetError(
                f"{path} has no column {config.text_column!r}, only {', '.join(names)}: name the "
                "column with the text by --text-column"
            )
        columns = [c for c in (config.text_column, config.time_column) if c in names]
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                text = row[config.text_column]
                if text is not None:
                    yield from _cut(str(text), row.get(config.time_column), str(path))


def _cut(text: str, time: Any, place: str) -> Iterator[RawDocument]:
    try:
        moment = datetime.fromisoformat(time) if isinstance(time, str) else time
        if moment is not None:
            moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, AttributeError) as error:
        raise DataSetError(
            f"{place}: {time!r} is no time: expected a timestamp or ISO 8601, such as "
            "2024-12-31T23:59:59Z; name another column with --time-column"
        ) from error
    return ((piece, moment) for piece in pieces(io.StringIO(text)))


def _binary(path: Path) -> DataSetError:
    return DataSetError(
        f"{path} is a binary file: expected UTF-8 text, JSONL or parquet (by the file's ending); "
        "leave it out of the pattern"
    )


def _not_utf8(path: Path, error: UnicodeDecodeError) -> DataSetError:
    if b"\0" in error.object:
        return _binary(path)
    return DataSetError(
        f"{path} is not UTF-8 text (byte 0x{error.object[error.start]:02x}: {error.reason}): "
        "expected files of one encoding, UTF-8; convert it, for example with `iconv -f LATIN1 -t "
        "UTF-8`, or leave it out of the pattern"
    )
