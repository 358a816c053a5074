"""From the tables to the comparison: the five commands of docs/domain-llm.md, one after another."""

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from encoders.lm.cli import lm
from feature_repo.command import SentenceGroup, Settings
from feature_repo.home import Home
from tests.encoders.lm.shop_home import make_home

CPU = ("--threads", "1", "--cpu")
RECORDS = ("listings", "baskets", "histories")
STEPS = {
    "corpus": [word for source in RECORDS for word in ("--built-in", source)],
    "tokenizer": ("--vocab-size", "600", "--phrase-share", "0.3"),
    "pretrain": ("--recipe", "tiny", "--steps", "12", "--precision", "float32", *CPU),
    "average": ("--threads", "1"),
    "tune": ("--epochs", "0.5", "--max-examples", "40", "--precision", "float32", *CPU),
    "evaluate": ("--document-bytes", "2000", "--max-examples", "4", "--speed-rounds", "1", *CPU),
}
"""Command -> what makes it small; each takes what the one before it made."""


def write_prose(folder: Path) -> str:
    """General text in the place of Python's documentation, which is long; gives its source."""
    folder.mkdir()
    for number in range(60):
        text = (
            f"Chapter {number} of the handbook explains how {number + 3} lamps are mended in order."
        )
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return f"prose=general:{folder}/*.txt"


def run_all(home: Home, prose: str, report: Path) -> dict[str, dict[str, Any]]:
    """Command -> the line that it prints."""
    group = SentenceGroup(commands=[lm])
    found = {}
    for name, small in STEPS.items():
        arguments = ["lm", name, *small]
        if name == "corpus":
            arguments += ["--source", prose]
        if name == "evaluate":
            arguments += ["--report", str(report)]
        result = CliRunner().invoke(group, arguments, obj=Settings(home, "embedded"))
        assert result.exit_code == 0, result.output
        (line,) = result.stdout.splitlines()
        found[name] = json.loads(line)
    return found


def test_each_command_takes_what_the_one_before_it_made(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", searches=True)
    prose, report = write_prose(tmp_path / "prose"), tmp_path / "lm.html"
    lines = run_all(home, prose, report)
    assert lines["pretrain"]["valid_bits_per_byte"]["baskets"] < 6  # 8 before anything is learned
    assert {path.name for path in home.models.iterdir()} == {
        "tiny",
        "tiny-average",
        "tiny-average-tuned",
    }
    models = lines["evaluate"]["models"]
    assert list(models) == [
        "tiny",
        "tiny-average",
        "tiny-average-tuned",
        "5-gram over the tokens of tiny",
    ]
    for figures in models.values():
        assert set(figures["bits_per_byte"]) >= {"listings", "baskets", "domain", "general"}
    tuned = models["tiny-average-tuned"]["tasks"]
    assert {"title", "query", "attribute:price", "attribute:shelf", "next_purchase"} <= set(tuned)
    assert "tiny-average-tuned" in report.read_text(encoding="utf-8")

    weights = {path: path.stat().st_mtime_ns for path in home.models.rglob("*.safetensors")}
    assert len(weights) >= 3
    again = run_all(home, prose, report)
    assert weights == {path: path.stat().st_mtime_ns for path in home.models.rglob("*.safetensors")}
    for name in ("pretrain", "average", "tune"):
        assert again[name]["folder"] == lines[name]["folder"]
    assert again["evaluate"]["models"].keys() == models.keys()
