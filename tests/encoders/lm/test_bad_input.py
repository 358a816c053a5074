"""What nobody can work with gets one sentence from the commands, and leaves nothing behind."""

import contextlib
import resource
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from encoders.lm.cli import lm
from feature_repo.command import SentenceGroup, Settings
from feature_repo.home import Home
from tests.encoders.lm.planted_models import byte_tokenizer, save, small_model
from tests.encoders.lm.planted_shop import NUM_DAYS, items, make_shop, orders

LITTLE_ROOM = 2048
"""Bytes that a file may have: less than any model, tokenizer or corpus needs."""


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_shop(tmp_path / "home")


def sentence(home: Home, *arguments: str) -> str:
    """What a command that cannot work says, below its bars."""
    result = run(home, *arguments)
    assert result.exit_code == 1, result.output
    assert not result.stdout
    assert sum(line.startswith("Error: ") for line in result.stderr.splitlines()) == 1
    last = str(result.stderr.splitlines()[-1])
    assert last.startswith("Error: ")
    return last


def run(home: Home, *arguments: str) -> Result:
    group = SentenceGroup(commands=[lm])
    return CliRunner().invoke(group, ["lm", *arguments], obj=Settings(home, "embedded"))


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


@pytest.mark.parametrize("command", ["corpus", "pretrain"])
def test_an_empty_corpus(tmp_path: Path, command: str) -> None:
    """Everything happened after the training cut, or no corpus was built at all."""
    late = make_shop(
        tmp_path / "late",
        orders(first_day=80, num_days=NUM_DAYS - 80),
        [(name, time + timedelta(days=200), *rest) for name, time, *rest in items()],  # type: ignore[misc]
    )
    if command == "corpus":
        found = sentence(late, "corpus", "--built-in", "listings", "--built-in", "baskets")
        assert "no source of the corpus has training text" in found
        assert not late.corpus.exists()
    else:
        byte_tokenizer().save_pretrained(late.tokenizers / "domain")
        assert "run `longtrail lm corpus` first" in sentence(late, "pretrain", "--steps", "1")
        assert not late.models.exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "b.txt is a binary file: expected UTF-8 text"),
        ("schöne Teller aus Holz".encode("latin-1"), "b.txt is not UTF-8 text (byte 0xf6: "),
        ("schöne Teller aus Holz".encode("utf-16"), "b.txt is a binary file"),
    ],
    ids=["binary", "latin-1 beside utf-8", "utf-16 beside utf-8"],
)
def test_binary_files_and_mixed_encodings(home: Home, content: bytes, expected: str) -> None:
    folder = home.root.parent / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("These plates are nice, and came from the café within a day.")
    (folder / "b.txt").write_bytes(content)
    arguments = ("--built-in", "baskets", "--source", f"texts=domain:{folder}/*.txt")
    found = sentence(home, "corpus", *arguments)
    assert expected in found
    assert not home.corpus.exists()


@pytest.mark.parametrize("command", ["generate", "tune", "pretrain", "evaluate"])
def test_a_tokenizer_and_a_model_that_do_not_fit(home: Home, command: str) -> None:
    assert run(home, "corpus", "--built-in", "baskets").exit_code == 0
    save(small_model(num_tokens=200), byte_tokenizer(), home.models / "misfit")
    arguments = {
        "generate": ("generate", "misfit", "a mug"),
        "tune": ("tune", "--model", "misfit", "--name", "new"),
        "pretrain": ("pretrain", "--model", "misfit", "--name", "new", "--steps", "1"),
        "evaluate": ("evaluate", "misfit"),
    }[command]
    found = sentence(home, *arguments)
    assert "misfit has 260 tokens, its model vectors for 200: they do not belong together" in found
    assert [path.name for path in home.models.iterdir()] == ["misfit"]


@pytest.mark.parametrize("command", ["corpus", "tokenizer", "pretrain", "merge", "tune"])
def test_a_full_disk(home: Home, command: str) -> None:
    """What was there stays, what was begun is no finished thing, and with room it works."""
    for name in ("one", "other"):
        save(small_model(), byte_tokenizer(), home.models / name)
    if command != "corpus":
        assert run(home, "corpus", "--built-in", "baskets").exit_code == 0
    byte_tokenizer().save_pretrained(home.tokenizers / "bytes")
    tuning = ("--epochs", "0.1", "--max-examples", "20")
    result, rest = {
        "corpus": (home.corpus, ("--built-in", "baskets", "--built-in", "histories")),
        "tokenizer": (home.tokenizers / "both", ("--name", "both", "--vocab-size", "400")),
        "pretrain": (
            home.models / "both",
            ("--name", "both", "--tokenizer", "bytes", "--steps", "1", "--cpu"),
        ),
        "merge": (home.models / "both", ("one", "other", "--name", "both")),
        "tune": (home.models / "both", ("--model", "one", "--name", "both", *tuning, "--cpu")),
    }[command]
    before = files_below(home.root)
    with files_of_at_most(LITTLE_ROOM):
        assert sentence(home, command, *rest).startswith("Error: a disk is full (")
    assert not result.exists()
    assert before <= files_below(home.root)
    assert run(home, command, *rest).exit_code == 0
    assert result.exists()


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow longer: the system then says what it says of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
