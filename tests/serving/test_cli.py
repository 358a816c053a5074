import hashlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from feature_repo.command import SentenceGroup, Settings
from feature_repo.home import PROJECT_ROOT, Home
from serving.cli import commands
from serving.security import KEYS_VARIABLE, ApiKeys
from tests.serving.conftest import World


def run(home: Path, *arguments: str, env: dict[str, str] | None = None) -> Result:
    group = SentenceGroup("longtrail", commands={str(one.name): one for one in commands})
    settings = Settings(home=Home(home), profile="embedded")
    return CliRunner().invoke(group, [*arguments], obj=settings, env=env)


@pytest.mark.parametrize("command", ["rank", "serve", "key"])
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
        ("rank", "ann", "--model-threads", "0"),
        ("rank", "ann", "--candidates", " , "),
        ("serve", "--port", "70000"),
        ("serve", "--workers", "0"),
        ("serve", "--threads", "0"),
        ("serve", "--shadow-share", "0"),
        ("serve", "--served-log", "1.5"),
        ("serve", "--on-store-error", "ignore"),
        ("serve", "--log-format", "xml"),
        ("serve", "--rate-limit", "often"),
        ("serve", "--cors-origin", "shop.example"),
        ("serve", "--cors-origin", "https://shop.example/"),
        ("serve", "--trusted-proxy", "proxy.example"),
        ("key",),
        ("key", "a b"),
        ("key", "dashboard", "--scope", "all"),
    ],
)
def test_usage(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert run(tmp_path, *arguments).exit_code == 2


def test_runs_that_are_not_there_are_said_before_anything_is_read(world: World) -> None:
    for option in ("--run", "--shadow"):
        result = run(world.home.root, "serve", "--port", "0", option, "other")
        assert result.exit_code == 1
        (line,) = result.stderr.splitlines()
        assert "run 'other'" in line


def test_wide_open_is_said_unless_keys_are_asked_for(tmp_path: Path) -> None:
    wide = ("serve", "--host", "0.0.0.0", "--port", "0")  # noqa: S104
    assert "Warning: 0.0.0.0 can be reached from other machines" in run(tmp_path, *wide).stderr
    assert "Warning" not in run(tmp_path, "serve", "--port", "0").stderr
    entry = json.loads(run(tmp_path, "key", "dashboard").stdout)["entry"]
    file = tmp_path / "keys.toml"
    file.write_text(entry, encoding="utf-8")
    assert "Warning" not in run(tmp_path, *wide, "--keys", str(file)).stderr
    assert "Warning" not in run(tmp_path, *wide, env={KEYS_VARIABLE: str(file)}).stderr


def test_a_file_of_keys_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    result = run(tmp_path, "serve", "--keys", str(file))
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: the file of API keys {file} cannot be read: No such file or directory\n"
    )


def test_key(tmp_path: Path) -> None:
    result = run(tmp_path, "key", "dashboard", "--scope", "read", "--scope", "write")
    assert result.exit_code == 0
    made = json.loads(result.stdout)
    (tmp_path / "keys.toml").write_text(made["entry"], encoding="utf-8")
    found = ApiKeys(tmp_path / "keys.toml").find(made["key"])
    assert found is not None
    assert found.name == "dashboard"
    assert sorted(found.scopes) == ["read", "write"]
    entry = tomllib.loads(made["entry"])["keys"]["dashboard"]
    assert entry["sha256"] == hashlib.sha256(made["key"].encode()).hexdigest()
    assert "stored nowhere" in result.stderr
    assert made["key"] not in result.stderr
    assert json.loads(run(tmp_path, "key", "other").stdout)["scopes"] == ["read"]


def test_the_commands_load_nothing_heavy() -> None:
    code = (
        "import sys, serving.cli\n"
        "print({'torch', 'feast', 'fastapi', 'prometheus_client'} & set(sys.modules))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT_ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert out.stdout == "set()\n"
