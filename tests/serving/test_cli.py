import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from feature_repo.command import SentenceGroup, Settings
from feature_repo.home import PROJECT_ROOT, Home
from serving.cli import commands
from tests.serving.conftest import World


def run(home: Path, *arguments: str) -> Result:
    group = SentenceGroup("longtrail", commands={str(one.name): one for one in commands})
    settings = Settings(home=Home(home), profile="embedded")
    return CliRunner().invoke(group, [*arguments], obj=settings)


@pytest.mark.parametrize("command", ["rank", "serve"])
def test_help_shows_defaults_and_an_example(tmp_path: Path, command: str) -> None:
    result = run(tmp_path, command, "--help")
    assert result.exit_code == 0
    assert f"Example: longtrail {command}" in result.stdout
    for option in next(one for one in commands if one.name == command).params:
        assert isinstance(option, click.Argument) or "[default:" in str(
            option.get_help_record(click.Context(click.Command(command)))
        )


@pytest.mark.parametrize("arguments", [("rank", "ann"), ("serve", "--port", "0")])
def test_nothing_trained_yet(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = run(tmp_path, *arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1] == (
        f"Error: {tmp_path}/runs/current.json does not exist yet: run `longtrail train` first"
    )


def test_unknown_run(world: World) -> None:
    result = run(world.home.root, "rank", "ann", "--run", "other")
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: there is no run 'other' in {world.home.runs}; there are: toy-run\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("rank",),
        ("rank", "ann", "--top", "0"),
        ("rank", "ann", "--threads", "0"),
        ("rank", "ann", "--candidates", " , "),
        ("serve", "--port", "70000"),
    ],
)
def test_usage(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert run(tmp_path, *arguments).exit_code == 2


def test_wide_open_is_said(tmp_path: Path) -> None:
    wide = run(tmp_path, "serve", "--host", "0.0.0.0", "--port", "0")  # noqa: S104
    assert "Warning: 0.0.0.0 can be reached from other machines" in wide.stderr
    assert "Warning" not in run(tmp_path, "serve", "--port", "0").stderr


def test_the_commands_load_nothing_heavy() -> None:
    code = "import sys, serving.cli; print({'torch', 'feast', 'fastapi'} & set(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT_ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert out.stdout == "set()\n"
