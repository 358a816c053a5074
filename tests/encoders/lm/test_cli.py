"""The group ``lm``: every command explains itself, and none of them slows the command line."""

import re
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from encoders.lm.cli import lm
from feature_repo.home import PROJECT_ROOT


@pytest.mark.parametrize("name", sorted(lm.commands))
def test_every_command_explains_itself(name: str) -> None:
    result = CliRunner().invoke(lm, [name, "--help"])
    assert result.exit_code == 0
    command = lm.commands[name]
    assert re.search(r"Examples?:", command.help or "")
    assert f"longtrail lm {name}" in (command.help or "")
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"lm {name} --{parameter.name} has no help"


def test_the_group_names_the_way_from_tokenizer_to_evaluation() -> None:
    steps = re.findall(r"longtrail lm (\w+)", lm.help or "")
    assert steps == ["tokenizer", "pretrain", "average", "tune", "evaluate"]
    assert set(steps) < set(lm.commands)


def test_help_is_quick() -> None:
    """No command line waits for what only its work needs."""
    code = "import sys, encoders.lm.cli; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT_ROOT
    )
    heavy = {
        "torch",
        "transformers",
        "tokenizers",
        "datasketch",
        "py3langid",
        "matplotlib",
        "feast",
    }
    assert not heavy & set(done.stdout.split())
