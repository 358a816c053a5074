"""The plan's numbers, by hand."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from encoders.lm.cli_pretrain import commands
from encoders.lm.model import count_parameters
from encoders.lm.plan import GIB, Cluster, plan
from encoders.lm.recipes import RECIPES
from feature_repo.command import SentenceGroup
from feature_repo.errors import EncoderError


def test_seven_billion_on_eight_gpus_by_hand() -> None:
    config = RECIPES["7b"]()
    made = plan(config, Cluster(gpus=8, gpu_memory_gb=80.0), tokens=3e12)
    weights = count_parameters(config.shape)
    assert made.weights_gb == made.gradients_gb == pytest.approx(weights * 4 / 8 / GIB)
    assert made.optimizer_gb == pytest.approx(weights * 8 / 8 / GIB)
    rows = made.pass_rows
    kept = rows * 4096 * 4096 * (2 * 32 + 34)  # each layer's input, and all of one layer
    assert made.activations_gb == pytest.approx(kept / GIB)
    assert made.fits
    parts = made.weights_gb + made.gradients_gb + made.optimizer_gb
    parts += made.gathered_gb + made.activations_gb
    assert made.total_gb == pytest.approx(parts + 0.08 * 80)
    assert made.host_gb == pytest.approx(weights * 12 / GIB)
    operations = 6 * weights + 12 * 32 * 4096 * 4096
    assert made.tokens_per_s == pytest.approx(8 * 989e12 * 0.4 / operations)
    assert made.days == pytest.approx(3e12 / made.tokens_per_s / 86_400)
    assert made.steps == -(-3_000_000_000_000 // (1024 * 4096))


def test_more_gpus_need_less_memory_each_and_less_time() -> None:
    few, many = (plan(RECIPES["13b"](), Cluster(n, 80.0), tokens=1e12) for n in (8, 64))
    assert many.weights_gb == pytest.approx(few.weights_gb / 8)
    assert many.days == pytest.approx(few.days / 8)
    assert few.tokens == 1e12


def test_what_does_not_fit_is_said() -> None:
    small = plan(RECIPES["13b"](), Cluster(gpus=1, gpu_memory_gb=80.0), tokens=1e9)
    assert not small.fits
    assert small.pass_rows == 1
    config = RECIPES["1b"]()
    again = replace(config, learning=replace(config.learning, checkpoint_activations=True))
    kept, less = (plan(c, Cluster(1, 40.0), tokens=1e9) for c in (config, again))
    assert kept.pass_rows < less.pass_rows == config.learning.pass_rows


def test_the_recipe_says_how_many_tokens_or_the_user_does() -> None:
    assert plan(RECIPES["7b"](), Cluster(8, 80.0)).steps == 715_000
    with pytest.raises(EncoderError, match="recipe tiny learns for some minutes"):
        plan(RECIPES["tiny"](), Cluster(1, 80.0))
    with pytest.raises(EncoderError, match="share_of_peak must be in"):
        Cluster(1, 80.0, share_of_peak=1.5)
    with pytest.raises(EncoderError, match="gpus must be above 0, got 0"):
        Cluster(0, 80.0)


def test_the_command() -> None:
    group = SentenceGroup(commands=commands)
    result = CliRunner().invoke(group, ["plan", "--recipe", "7b", "--gpus", "8"])
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout)
    assert line["recipe"] == "7b"
    assert line["fits"] is True
    alone = CliRunner().invoke(group, ["plan", "--recipe", "13b", "--gpus", "1"])
    assert "Does not fit" in alone.stderr
    assert json.loads(alone.stdout)["fits"] is False
