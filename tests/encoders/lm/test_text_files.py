"""Files of text: what is read, and one sentence on what cannot be."""

import gzip
import io
import json
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.lm.text_files import FileSource, file_source, parse_source, pieces, python_docs
from feature_repo.errors import DataSetError


def read(pattern: Path | str, **options: str) -> list[tuple[str, datetime | None]]:
    config = FileSource("mine", "domain", str(pattern), **options)
    return list(file_source(config).read())


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_every_form_of_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_bytes("\ufeffcafé\r\nau lait".encode())
    rows = lines({"text": "one", "time": "2024-05-01T12:00:00+02:00"}, {"text": "two"})
    (tmp_path / "deep" / "b.jsonl").write_text(rows + "\n")
    table = {
        "text": ["three", None, "four"],
        "time": [datetime.fromisoformat("2024-05-02"), None, None],
        "n": [1] * 3,
    }
    pq.write_table(pa.table(table), tmp_path / "deep" / "c.parquet")
    found = read(tmp_path / "**" / "*.*")
    assert found == [
        ("café\nau lait", None),
        ("one", datetime(2024, 5, 1, 10, tzinfo=UTC)),
        ("two", None),
        ("three", datetime(2024, 5, 2, tzinfo=UTC)),
        ("four", None),
    ]


def test_columns_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines({"body": "x", "at": "2024-05-01"}))
    found = read(tmp_path / "a.jsonl", text_column="body", time_column="at")
    assert found == [("x", datetime(2024, 5, 1, tzinfo=UTC))]


def test_a_changed_file_is_another_source(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    config = FileSource("mine", "domain", str(path))
    before = file_source(config).fingerprint({})
    assert file_source(config).fingerprint({}) == before
    assert file_source(config).fingerprint({"scrub": True}) != before
    path.write_text("one more")
    assert file_source(config).fingerprint({}) != before


@settings(derandomize=True)
@given(st.text("ab \n", max_size=80), st.integers(1, 20))
def test_long_texts_are_cut_and_nothing_is_lost(text: str, size: int) -> None:
    parts = list(pieces(io.StringIO(text, newline=""), size))
    assert "".join(parts) == text
    assert all(0 < len(part) <= size for part in parts)


def test_long_texts_are_cut_at_lines_then_words() -> None:
    assert list(pieces(io.StringIO("one two\nthree four five"), 12)) == [
        "one two",
        "\nthree four",
        " five",
    ]


PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", PNG, "a.txt is a binary file: expected UTF-8 text"),
        ("a.txt", b"abc\x00def", "a.txt is a binary file"),
        # A fixed time of writing: what is in a test's name must be the same in every process.
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "a.jsonl is a binary file"),
        ("a.txt", "schön".encode("utf-16"), "a.txt is a binary file"),
        ("a.txt", "schön".encode("latin-1"), r"is not UTF-8 text \(byte 0xf6: .*expected files of"),
        ("a.jsonl", b'{"text": "sch\xf6n"}', "is not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"', r"line 2 is not JSON .*: expected one object"),
        ("a.jsonl", b'{"body": "a"}', r"line 1 has no string 'text': .*--text-column"),
        ("a.jsonl", b"[1]", "line 1 has no string 'text'"),
        ("a.jsonl", b'{"text": "a", "time": "soon"}', "line 1: 'soon' is no time: expected"),
        ("a.jsonl", b'{"text": "a", "time": 5}', "line 1: 5 is no time: expected"),
        ("a.parquet", b"no parquet", "a.parquet cannot be read as parquet"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataSetError, match=sentence):
        read(tmp_path / name)


def test_missing_files_and_columns(tmp_path: Path) -> None:
    with pytest.raises(DataSetError, match=r"source mine: no file matches .*nothing: expected"):
        read(tmp_path / "nothing")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataSetError, match=r"no column 'text', only body: name .* --text-column"):
        read(tmp_path / "a.parquet")


def test_sources_are_named_in_one_form() -> None:
    given = parse_source("logs=general:/a:b/*.txt", text_column="t", time_column="at")
    assert given == FileSource("logs", "general", "/a:b/*.txt", "t", "at")
    for text in ("logs", "logs=general", "logs=general:"):
        with pytest.raises(DataSetError, match="a source is named as NAME=KIND:GLOB, such as"):
            parse_source(text, text_column="t", time_column="at")
    with pytest.raises(
        DataSetError, match="made of lower-case letters, digits, _ and -, got 'A/b'"
    ):
        parse_source("A/b=general:x", text_column="t", time_column="at")
    with pytest.raises(DataSetError, match="must be of the kind domain or general, got 'other'"):
        parse_source("a=other:x", text_column="t", time_column="at")


def test_python_documents_itself() -> None:
    source = python_docs()
    texts = [text for text, time in islice(source.read(), 300) if time is None]
    assert (source.kind, len(texts)) == ("general", 300)
    assert "Record of phased-in incompatible language changes." in texts[0]
