"""The backbones benchmark: from raw logs to its table; what is stale is refused."""

from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from transformers import AutoModel

from benchmarks import results_file
from benchmarks.bench_backbones import (
    AS_LEARNED,
    FIRST,
    RECIPE_NAMES,
    measure_all,
    plain_backbones,
    table,
    with_tuned,
)
from benchmarks.results_file import write_result
from encoders.config import EncoderConfig, TuningConfig
from encoders.lm.records import LISTING, TITLE
from feature_repo.dataset import load_dataset
from feature_repo.errors import EncoderError
from feature_repo.home import PROJECT_ROOT, Home
from feature_repo.manifest import load_manifest
from feature_repo.shop import ShopConfig, generate_shop
from tests.encoders.lm.planted_models import SPECIAL, byte_tokenizer, save, small_model
from training.recipes import RECIPES

NAMES = ["minilm", "minilm_tuned", "domain_llm", "domain_llm_tuned"]
TUNING = TuningConfig(steps=2, batch_texts=16, group_texts=8)
RECIPE = RECIPES["mean_pooling"]()
"""Reads each backbone's vectors, and is the quickest to train and export."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("backbones") / "home")


@pytest.fixture(scope="module")
def plain(home: Home) -> dict[str, EncoderConfig]:
    """The backbones as the command has them, another small model in MiniLM's place."""
    tokenizer = byte_tokenizer(num_tokens=270, special=[*SPECIAL, LISTING, TITLE])
    folders = [
        save(small_model(270, seed=seed), tokenizer, home.root.parent / f"model-{seed}")
        for seed in (0, 1)
    ]
    found = plain_backbones(folders[0])
    assert found == {
        FIRST: EncoderConfig(),
        "domain_llm": EncoderConfig(model=str(folders[0]), prompt=AS_LEARNED),
    }
    return found | {FIRST: EncoderConfig(model=str(folders[1]))}


@pytest.fixture(scope="module")
def result(home: Home, plain: dict[str, EncoderConfig]) -> dict[str, Any]:
    shop = home.root.parent / "shop"
    generate_shop(shop, ShopConfig(num_users=40, num_events=800))
    file = PROJECT_ROOT / "feature_repo" / "datasets" / "shop.toml"
    dataset = load_dataset(file, data_dir=shop)
    return measure_all(home, dataset, plain, RECIPE, TUNING, num_seeds=1, threads=1)


def test_every_backbone_is_measured_against_the_first(result: dict[str, Any]) -> None:
    found = result["backbones"]
    assert list(found) == list(result["models"]) == NAMES
    assert len({one["fingerprint"] for one in found.values()}) == len(NAMES)
    for name, one in found.items():
        assert 0 < one["auc_low"] < one["auc"] < one["auc_high"] < 1
        assert result["models"][name]["runs"] == [f"backbones-{name}-mean_pooling-seed0"]
        assert one["auc"] == result["models"][name]["auc"]
        if name == FIRST:
            assert "auc_difference" not in one
        else:
            assert one["auc_difference"] == pytest.approx(one["auc"] - found[FIRST]["auc"])
            assert one["auc_difference_low"] < one["auc_difference"] < one["auc_difference_high"]
            assert result["against_minilm"][name]["all"]["logloss"]["low"] is not None


def test_costs_are_those_of_both_halves(
    home: Home, plain: dict[str, EncoderConfig], result: dict[str, Any]
) -> None:
    whole = AutoModel.from_pretrained(plain["domain_llm"].model)
    num_texts = pq.read_metadata(home.behaviors).num_rows
    for one in result["backbones"].values():
        halves = one["num_parameters_shallow"] + one["num_parameters_deep"]
        assert halves == sum(p.numel() for p in whole.parameters())
        assert one["num_parameters_shallow"] > whole.embed_tokens.weight.numel()
        assert (one["split_layer"], one["width"], one["num_encoded_texts"]) == (1, 32, num_texts)
        assert one["encode_texts_per_s"] == pytest.approx(
            num_texts / one["encode_seconds"], rel=0.1
        )


def test_labels_that_a_backbone_has_seen_are_counted(home: Home, result: dict[str, Any]) -> None:
    rows = pq.read_table(home.impressions, columns=["split", "event_timestamp"])
    valid: datetime = load_manifest(home).split.valid
    num_before = pc.sum(pc.less(rows["event_timestamp"], valid)).as_py()
    found = {name: one["seen_labels"] for name, one in result["backbones"].items()}
    assert found[FIRST] == {}
    # Few events: tuning takes all of those before the validation period.
    assert found["minilm_tuned"] == found["domain_llm"] == found["domain_llm_tuned"]
    assert sum(found["domain_llm"].values()) == num_before > 0
    assert not found["domain_llm"].keys() & {"valid", "test"}


def test_the_page_has_the_table(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = table(result).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in NAMES]
    assert len({line.count("|") for line in lines}) == 1
    one = result["backbones"]["domain_llm"]
    assert f"| {one['auc']:.4f} [{one['auc_low']:.3f}, {one['auc_high']:.3f}] |" in lines[4]
    assert f"| {one['auc_difference']:+.4f} [{one['auc_difference_low']:+.4f}, " in lines[4]
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    page = write_result("backbones", "command", result, page=table(result)).with_suffix(".md")
    assert f"\n\n{table(result)}\n" in page.read_text()


def test_other_tuned_models_are_refused(
    home: Home, plain: dict[str, EncoderConfig], result: dict[str, Any]
) -> None:
    assert list(with_tuned(home, plain, TUNING)) == list(result["backbones"])
    exchanged = plain | {FIRST: plain["domain_llm"]}
    for changed, tuning in ((exchanged, TUNING), (plain, replace(TUNING, steps=3))):
        with pytest.raises(EncoderError, match=r"minilm-tuned was not tuned from .* delete it"):
            with_tuned(home, changed, tuning)


def test_only_recipes_with_a_deep_half_are_offered() -> None:
    assert {"bahe_base", "bahe_fast"} <= set(RECIPE_NAMES)
    assert not {"popularity", "trees", "full_text"} & set(RECIPE_NAMES)
