import click
import pytest
from click.testing import CliRunner

from feature_repo.command import SentenceGroup, Settings
from feature_repo.home import Home
from training.cli import commands
from training.cli_train import _recipe
from training.recipes import RECIPES


@pytest.fixture
def group():
    return SentenceGroup("longtrail", commands={command.name: command for command in commands})


def invoke(group, home, *arguments):
    settings = Settings(home=Home(home), profile="embedded")
    return CliRunner().invoke(group, list(arguments), obj=settings)


@pytest.mark.parametrize("command", commands, ids=lambda c: c.name)
def test_every_command_has_help_with_defaults_and_an_example(command, group, tmp_path):
    result = invoke(group, tmp_path, command.name, "--help")
    assert result.exit_code == 0
    assert f"longtrail {command.name}" in result.output
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name != "help":
            assert parameter.help, parameter.name
    assert "default" in result.output


def test_names():
    assert [command.name for command in commands] == ["train", "evaluate", "export", "drift"]


def test_overrides_change_only_what_is_given():
    base = RECIPES["bahe_small"]()
    assert _recipe("bahe_small", {"training.epochs": None, "sequence_length": None}, []) == base
    shortcuts = {"training.epochs": 7, "training.learning_rate": 0.1 + 0.2, "sequence_length": 11}
    changed = _recipe("bahe_small", shortcuts, ["training.seed=3", "training.epochs=8"])
    assert (changed.training.epochs, changed.training.seed) == (8, 3)
    assert (changed.sequence_length, changed.training.learning_rate) == (11, 0.1 + 0.2)
    assert changed.model == base.model


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train"], "run `longtrail ingest` first"),
        (["train", "--set", "training.epoch=1"], "did you mean epochs"),
        (["train", "--set", "training.epochs=x"], "training.epochs takes int, got 'x'"),
        (["evaluate"], "run `longtrail train` first"),
        (["export"], "run `longtrail train` first"),
        (["drift"], "run `longtrail train` first"),
        (["evaluate", "some-run"], "run `longtrail ingest` first"),
    ],
)
def test_a_step_too_early_gets_one_sentence(group, tmp_path, arguments, sentence):
    result = invoke(group, tmp_path, *arguments)
    assert result.exit_code == 1
    assert sentence in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--recipe", "unknown"],
        ["train", "--epochs", "0"],
        ["train", "--learning-rate", "0"],
        ["train", "--track", "elsewhere"],
        ["evaluate", "--split", "later"],
        ["drift", "--window", "0d"],
        ["drift", "--window", "a week"],
        ["drift", "--threshold", "0"],
    ],
)
def test_wrong_usage_is_code_2(group, tmp_path, arguments):
    assert invoke(group, tmp_path, *arguments).exit_code == 2
