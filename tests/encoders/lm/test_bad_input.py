"""What nobody can work with gets one sentence from the commands, and leaves nothing behind."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from encoders.lm.cli import lm
from feature_repo.command import SentenceGroup, Settings
from feature_repo.home import PROJECT_ROOT, Home
from tests.encoders.lm.planted_models import byte_tokenizer, save, small_model
from tests.encoders.lm.planted_shop import NUM_DAYS, items, make_shop, orders

LITTLE_ROOM = 2048
"""Bytes that a file may have: less than any model, tokenizer or corpus needs."""
FULL_DISK = """
import resource, sys
from longtrail import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
main(sys.argv[2:], prog_name="longtrail")
"""


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_shop(tmp_path / "home")


def sentence(home: Home, *arguments: str) -> str:
    """What a command that cannot work says, below its bars."""
    result = run(home, *arguments)
    assert result.exit_code == 1, result.output
    assert not result.stdout
    assert result.stderr.count("Error") == 1
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


@pytest.mark.parametrize("command", ["corpus", "merge"])
def test_a_full_disk(home: Home, command: str) -> None:
    """What was there stays, what was begun is no finished thing, and with room it works."""
    for name in ("one", "other"):
        save(small_model(), byte_tokenizer(), home.models / name)
    arguments = {
        "corpus": ["lm", "corpus", "--built-in", "baskets", "--built-in", "histories"],
        "merge": ["lm", "merge", "one", "other", "--name", "both"],
    }[command]
    result = home.corpus if command == "corpus" else home.models / "both"
    before = files_below(home.root)
    full = run_with_room(home, LITTLE_ROOM, arguments)
    assert full.returncode == 1, full.stderr
    assert full.stderr.splitlines()[-1].startswith("Error: a disk is full (")
    assert "Traceback" not in full.stderr
    assert not full.stdout
    assert not result.exists()
    assert before <= files_below(home.root)
    assert run_with_room(home, 2**30, arguments).returncode == 0
    assert result.exists()


def run_with_room(
    home: Home, file_bytes: int, arguments: list[str]
) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, whose files may not be longer."""
    return subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(file_bytes), "--home", str(home.root), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=PROJECT_ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
