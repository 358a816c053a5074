"""The command line as users meet it: help, documentation, one sentence on mistakes."""

import json
import re
import time
from datetime import timedelta
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from encoders.lm.cli import lm
from feature_repo.home import PROJECT_ROOT, Home
from feature_repo.manifest import load_manifest
from longtrail import main
from serving.ranker import Ranker
from tests.feature_repo.conftest import TOML, write_files

COMMANDS = sorted(main.commands)


def run(home: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["--home", str(home), *arguments])


def _files(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.suffix != ".lock"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0
    command = main.commands[name]
    assert command.help
    assert re.search(r"Examples?:", command.help)
    assert f"longtrail {name}" in command.help
    assert "\\b" not in result.output  # click's mark of lines to leave alone, misspelt
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name != "help":
            assert parameter.help, f"{name} --{parameter.name} has no help"


@pytest.mark.parametrize("name", sorted(lm.commands))
def test_every_command_of_the_language_model_explains_itself(name: str) -> None:
    result = CliRunner().invoke(main, ["lm", name, "--help"])
    assert result.exit_code == 0
    command = lm.commands[name]
    assert f"longtrail lm {name}" in (command.help or "")
    assert "\\b" not in result.output
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name != "help":
            assert parameter.help, f"lm {name} --{parameter.name} has no help"
    assert f"longtrail lm {name}" in (PROJECT_ROOT / "docs" / "domain-llm.md").read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented(name: str) -> None:
    readme = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")
    assert f"longtrail {name}" in readme


def test_the_documents_speak_of_commands_and_files_that_exist() -> None:
    for document in (PROJECT_ROOT / "README.md", *sorted((PROJECT_ROOT / "docs").glob("*.md"))):
        text = document.read_text(encoding="utf-8")
        for name in re.findall(r"`longtrail (?:--\S+ \S+ )?([a-z]+)", text):
            assert name in main.commands, f"{document.name} speaks of `longtrail {name}`"
        pattern = r"`((?:feature_repo|encoders|training|serving|benchmarks|docs)/[\w/.-]+\.\w+)`"
        for path in re.findall(pattern, text):
            assert (PROJECT_ROOT / path).exists(), f"{document.name} speaks of {path}"


def test_a_data_set_of_ones_own_needs_no_python(tmp_path: Path) -> None:
    write_files(tmp_path)
    (tmp_path / "kitchen.toml").write_text(TOML, encoding="utf-8")
    home = tmp_path / "home"
    dry = run(home, "ingest", str(tmp_path / "kitchen.toml"), "--dry-run")
    assert dry.exit_code == 0, dry.stderr
    told = json.loads(dry.stdout)
    assert told["dry_run"]
    assert told["samples"]["items"]
    assert not home.exists()
    result = run(home, "ingest", str(tmp_path / "kitchen.toml"))
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["scenes"] == ["buy", "look", "search"]
    assert "taken as UTC" in result.stderr
    built = run(home, "sequences", "--threads", "1")
    assert json.loads(built.stdout)["user_sequences"]["num_rows"] > 500
    assert json.loads(run(home, "apply").stdout)["services"] == ["ctr_v1"]
    copied = json.loads(run(home, "materialize").stdout)
    assert set(copied["views"]) == {"user_sequences", "user_stats", "items", "item_neighbors"}


def test_deep_outputs_are_features_that_serving_keeps_up_to_date(tmp_path: Path) -> None:
    """From one's own data to a served user: exported, found, outdated, written back, compared."""
    write_files(tmp_path)
    (tmp_path / "kitchen.toml").write_text(TOML, encoding="utf-8")
    home = tmp_path / "home"
    for step in (
        ["ingest", str(tmp_path / "kitchen.toml")],
        ["encode"],
        ["sequences", "--threads", "1"],
        ["apply"],
        ["train", "--recipe", "bahe_small", "--threads", "1"],
        ["export"],
        ["apply"],
        ["materialize"],
    ):
        done = run(home, *step)
        assert done.exit_code == 0, done.stderr
    ranker = Ranker.open(Home(home), "embedded")
    ranker.warm_up()
    now = load_manifest(Home(home)).now()
    assert ranker.rank("1").path == "cached"
    assert ranker.rank("no such user").path == "live"
    later = now + timedelta(days=400)
    computed = ranker.rank("1", at=later)
    assert computed.path == "live"
    end = time.monotonic() + 20
    while (kept := ranker.rank("1", at=later)).path == "live":
        assert time.monotonic() < end, "never written back"
        time.sleep(0.05)
    assert kept.path == "cached"
    assert [item.item_id for item in kept.ranked] == [item.item_id for item in computed.ranked]
    np.testing.assert_allclose(
        [item.score for item in kept.ranked], [item.score for item in computed.ranked], atol=1e-6
    )
    report = json.loads(run(home, "parity", "--sample", "50").stdout)
    assert report["mismatches"] == 0
    users = next(view for name, view in report["views"].items() if name.startswith("user_emb"))
    assert users["recomputed"] == 1


MISTAKES = {
    "doctor before ingest": (["doctor"], "run `longtrail ingest` first"),
    "status before ingest": (["status"], "run `longtrail ingest` first"),
    "no data set file": (["ingest", "nowhere.toml"], "nowhere.toml does not exist"),
    "encode before ingest": (["encode"], "run `longtrail ingest` first"),
    "sequences before ingest": (["sequences"], "run `longtrail ingest` first"),
    "materialize before ingest": (["materialize"], "run `longtrail ingest` first"),
    "parity before ingest": (["parity"], "run `longtrail ingest` first"),
    "train before ingest": (["train"], "run `longtrail ingest` first"),
    "evaluate without a run": (["evaluate"], "longtrail train"),
    "export without a run": (["export"], "longtrail train"),
    "rank without a run": (["rank", "1"], "longtrail train"),
    "serve without a run": (["serve", "--port", "0"], "longtrail train"),
    "too small a shop": (["shop", "{tmp}/shop", "--num-events", "3"], "at least 10 per user"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_gets_one_sentence_exit_code_1_and_leaves_nothing(
    tmp_path: Path, case: str
) -> None:
    arguments, sentence = MISTAKES[case]
    home = tmp_path / "home"
    result = run(home, *(a.replace("{tmp}", str(tmp_path)) for a in arguments))
    assert result.exit_code == 1, result.output
    assert not result.stdout
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert sentence in errors[0]
    assert not [
        p for p in tmp_path.rglob("*") if p.is_file() and p.suffix not in (".lock", ".yaml")
    ]


def test_an_unknown_profile_is_a_mistake(tmp_path: Path) -> None:
    write_files(tmp_path)
    (tmp_path / "kitchen.toml").write_text(TOML, encoding="utf-8")
    home = tmp_path / "home"
    assert run(home, "ingest", str(tmp_path / "kitchen.toml")).exit_code == 0
    before = _files(home)
    result = CliRunner().invoke(main, ["--home", str(home), "--profile", "cloud", "apply"])
    assert result.exit_code == 1
    assert "no profile 'cloud'; expected embedded" in result.stderr
    assert _files(home) == before


def test_wrong_usage_is_exit_code_2(tmp_path: Path) -> None:
    assert run(tmp_path, "ingest").exit_code == 2
    assert run(tmp_path, "rank").exit_code == 2
    assert run(tmp_path, "nonsense").exit_code == 2
