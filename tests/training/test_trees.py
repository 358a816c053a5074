"""Trees copied from a library score as the library does, are exported, saved and learn."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingClassifier

from encoders.inputs import ItemInputs, UserInputs
from encoders.loaded_artifact import load_artifact, read_program
from feature_repo.artifact import current_run, load_run_manifest
from feature_repo.errors import LongtrailError
from tests.training.world import (
    SCENES,
    make_world,
    random_inputs,
    small_bahe,
    small_deep_half,
    small_schema,
)
from training import tree_ensemble
from training.artifact import load_model
from training.build import build_model
from training.calibration import CalibratedModel
from training.config import EnsembleConfig, TreesConfig
from training.dataset import ClickData
from training.impressions import Impressions
from training.metrics import auc, row_losses
from training.program import save_program
from training.program_inputs import ProgramInputs
from training.recipes import RECIPES
from training.scoring import probabilities, score
from training.train import read_splits, train
from training.tree_ensemble import GrownTrees, TreeEnsemble
from training.trees import _GROWERS, Trees

SMALL = TreesConfig(
    num_trees=12, learning_rate=0.06, num_leaves=8, max_depth=4, min_rows_per_leaf=5, l2=1.0
)


def random_rows(num: int, seed: int):
    """Numbers, small integers (many ties), and columns with and without missing values."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(num, 5)).astype(np.float32)
    x[:, 1:3] = generator.integers(-2, 3, size=(num, 2))
    x[generator.random((num, 5)) < [0.3, 0.2, 0, 0, 0]] = np.nan
    y = (np.nan_to_num(x[:, 0], nan=1.0) + x[:, 2] * x[:, 3] > 0) ^ np.isnan(x[:, 1])
    return x, (y ^ (generator.random(num) < 0.1)).astype(np.int64)


def hard_rows(trees: GrownTrees) -> np.ndarray:
    """Every threshold of every column, the numbers beside it, and missing values."""
    inner = trees.left != np.arange(len(trees.left))
    with np.errstate(over="ignore"):  # "all that is not missing" is a number no float32 holds
        at = trees.threshold[inner].astype(np.float32)
    beside = [np.nextafter(at, np.float32(side), dtype=np.float32) for side in (-np.inf, np.inf)]
    values = np.concatenate([at, *beside, np.float32([np.nan, 0, -0.0])])
    # LightGBM reads 1e-35 as 0, and infinity as 1e300; no feature is either.
    values = values[~(np.isinf(values) | ((values != 0) & (np.abs(values) < 1e-30)))]
    rows, _ = random_rows(5 * len(values), seed=3)
    for column in range(5):
        rows[column * len(values) : (column + 1) * len(values), column] = values
    rows[::7] = np.where(np.arange(5) == 2, np.nan, rows[::7])  # never missing in training
    return rows


@pytest.fixture(params=["sklearn", "lightgbm"])
def library(request: pytest.FixtureRequest) -> str:
    if request.param == "lightgbm":
        pytest.importorskip("lightgbm", reason="an extra", exc_type=(ImportError, OSError))
    return str(request.param)


def library_logits(
    library: str, num_trees: int, x: np.ndarray, config: TreesConfig = SMALL
) -> np.ndarray:
    """What the library's own model of the same rows and settings says."""
    rows, labels = random_rows(600, seed=1)
    if library == "sklearn":
        model = HistGradientBoostingClassifier(
            learning_rate=config.learning_rate,
            max_iter=num_trees,
            max_leaf_nodes=config.num_leaves,
            max_depth=config.max_depth,
            min_samples_leaf=config.min_rows_per_leaf,
            l2_regularization=config.l2,
            max_features=config.feature_share,
            early_stopping=False,
            random_state=0,
        )
        return model.fit(rows, labels).decision_function(x)
    import lightgbm

    settings = {
        "objective": "binary",
        "learning_rate": config.learning_rate,
        "num_leaves": config.num_leaves,
        "max_depth": config.max_depth,
        "min_data_in_leaf": config.min_rows_per_leaf,
        "lambda_l2": config.l2,
        "feature_fraction_bynode": config.feature_share,
        "num_threads": 1,
        "deterministic": True,
        "force_row_wise": True,
        "verbose": -1,
        "seed": 0,
    }
    booster = lightgbm.train(settings, lightgbm.Dataset(rows, labels), num_trees)
    return booster.predict(x, raw_score=True)


def test_copied_trees_score_as_the_library_does(library, monkeypatch):
    torch.set_num_threads(1)
    grown = _GROWERS[library](SMALL, *random_rows(600, seed=1), *random_rows(200, seed=2), 0)
    assert 1 <= len(grown.roots) <= SMALL.num_trees
    x = np.concatenate([hard_rows(grown), random_rows(300, seed=4)[0]])
    ensemble = TreeEnsemble()
    ensemble.set_trees(grown, num_features=x.shape[1])
    found = ensemble(torch.from_numpy(x)).numpy()
    monkeypatch.setattr(tree_ensemble, "TREES_AT_ONCE", 5)
    monkeypatch.setattr(tree_ensemble, "ROWS_AT_ONCE", 7)
    np.testing.assert_allclose(ensemble(torch.from_numpy(x)).numpy(), found, atol=1e-6)
    expected = library_logits(library, len(grown.roots), x)
    assert np.unique(expected).size > 50
    np.testing.assert_allclose(found, expected, atol=2e-6)


def one_split(
    threshold: float, *, missing_left: bool = False, feature: int = 0, base: float = 0.0
) -> TreeEnsemble:
    """A tree that says -1 on the left and 1 on the right."""
    ensemble = TreeEnsemble()
    ensemble.set_trees(
        GrownTrees(
            feature=np.array([feature, 0, 0]),
            threshold=np.array([threshold, 0, 0]),
            missing_left=np.array([missing_left, False, False]),
            left=np.array([1, 1, 2]),
            right=np.array([2, 1, 2]),
            value=np.array([0, -1, 1.0]),
            roots=np.array([0]),
            depth=1,
            base=base,
        ),
        num_features=feature + 1,
    )
    return ensemble


def test_thresholds_that_no_float32_holds_split_float32_numbers_alike():
    for threshold in (0.1, -0.1, 1 / 3, 0.5):
        ensemble = one_split(threshold, base=0.25)
        near = np.float32(threshold)
        x = np.array([np.nextafter(near, np.float32(s)) for s in (-9, 9)] + [near], np.float32)
        expected = np.where(x.astype(np.float64) <= threshold, -0.75, 1.25)
        np.testing.assert_array_equal(ensemble(torch.from_numpy(x[:, None])).numpy(), expected)


@pytest.mark.parametrize("threshold", [-np.inf, 0.0, np.inf])
@pytest.mark.parametrize("missing_left", [False, True])
def test_infinite_and_missing_values_go_where_they_shall(threshold, missing_left):
    """With infinity as threshold all but missing values go left: scikit-learn splits so, too."""
    ensemble = one_split(threshold, missing_left=missing_left, feature=1)
    x = np.array([-np.inf, -1, 0, 1, np.inf, np.nan], np.float32)
    left = np.where(np.isnan(x), missing_left, x <= threshold)
    rows = torch.from_numpy(np.stack([np.full_like(x, np.nan), x], axis=1))
    np.testing.assert_array_equal(ensemble(rows).numpy(), np.where(left, -1.0, 1.0))


def test_growing_stops_where_validation_rows_gain_nothing(library):
    rows, labels = random_rows(600, seed=1)
    noise = np.random.default_rng(0).integers(0, 2, 200)
    config = replace(SMALL, num_trees=100_000, patience=3)  # would take hours
    grown = _GROWERS[library](config, rows, labels, random_rows(200, seed=2)[0], noise, 0)
    assert 1 <= len(grown.roots) < 1000


def test_as_many_trees_are_kept_as_have_the_lowest_loss(library):
    config = replace(SMALL, learning_rate=0.5, num_trees=30)
    valid, labels = random_rows(200, seed=2)
    grown = _GROWERS[library](config, *random_rows(600, seed=1), valid, labels, 0)
    losses = [
        row_losses(labels, probabilities(library_logits(library, count, valid, config))).mean()
        for count in range(1, config.num_trees + 1)
    ]
    assert 1 < len(grown.roots) < config.num_trees
    assert len(grown.roots) == int(np.argmin(losses)) + 1


def test_without_lightgbm_the_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    rows = random_rows(20, seed=0)
    with pytest.raises(LongtrailError, match=r"install the extra .* or train the recipe `trees`"):
        _GROWERS["lightgbm"](SMALL, *rows, *rows, 0)


def clicks(num: int, seed: int) -> ClickData:
    """One candidate per context; clicked where exactly one of two features is positive."""
    generator = np.random.default_rng(seed)
    schema = small_schema()
    dense = generator.normal(size=(num, 2)).astype(np.float32)
    evidence = generator.normal(size=(num, len(schema.evidence_names))).astype(np.float32)
    clicked = ((dense[:, 0] > 0) ^ (evidence[:, 3] > 0)).astype(np.int64)
    dense[generator.random(num) < 0.1, 1] = np.nan
    history = np.zeros((num, len(SCENES), 1))
    names = np.array(["x"] * num, object)
    return ClickData(
        users=UserInputs(
            history.astype(np.int64),
            history.astype(np.int64),
            history.astype(np.float32),
            np.zeros((num, len(SCENES)), np.float32),
            np.zeros((num, 1), np.float32),
        ),
        items=ItemInputs(
            np.ones(num, np.int64),
            np.arange(num) + 1,
            dense,
            np.zeros((num, 1), np.int64),
            np.zeros((num, 0), np.int64),
            np.zeros((num, 0, 2), np.float32),
        ),
        context=np.zeros((num, 1), np.float32),
        evidence=evidence,
        clicked=clicked,
        offsets=np.arange(num + 1),
        impressions=Impressions(
            names,
            names,
            names,
            times=np.zeros(num, np.int64),
            clicked=clicked,
            extra=np.zeros(num, np.bool_),
            context=np.zeros((num, 1), np.float32),
            context_names=("hour",),
        ),
        user_dense_names=schema.user_dense_names,
        item_dense_names=schema.item_dense_names,
        category_vocabularies=dict(schema.category_vocabularies),
        evidence_names=schema.evidence_names,
    )


def test_a_planted_interaction_is_learned():
    # Neither feature tells anything alone, so it takes a while until both are split by.
    config = replace(SMALL, num_trees=60, num_leaves=16, learning_rate=0.3, feature_share=1.0)
    model = Trees(config, small_schema())
    model.fit(clicks(3000, seed=0), clicks(1000, seed=1), seed=0)
    test = clicks(1000, seed=2)
    found = auc(test.clicked, score(model, torch.zeros(2, 16), test, truncate=True))
    assert found is not None
    assert found > 0.97
    # The column that decides is of the item's exact evidence: without that kind nothing is left.
    blind = Trees(replace(config, use_exact_evidence=False), small_schema())
    blind.fit(clicks(3000, seed=0), clicks(1000, seed=1), seed=0)
    without = auc(test.clicked, score(blind, torch.zeros(2, 16), test, truncate=True))
    assert without is not None
    assert without < 0.6


@pytest.fixture(scope="module")
def grown() -> Trees:
    model = Trees(SMALL, small_schema()).eval()
    model.fit(clicks(500, seed=0), clicks(200, seed=1), seed=0)
    return model


def test_exported_program_equals_the_eager_model(grown, tmp_path):
    save_program(grown, small_schema(), tmp_path / "score.pt2")
    program = read_program(tmp_path / "score.pt2").module()
    for sizes in ((1, 1, 2), (6, 9, 40)):
        inputs = random_inputs(*sizes, seed=sum(sizes))
        found = program(*inputs)
        torch.testing.assert_close(found, grown(*inputs), atol=1e-6, rtol=1e-6)
        assert torch.isfinite(found).all()
    assert found.unique().numel() > 10


def test_missing_values_and_padding(grown):
    inputs = random_inputs(4, 5, 30)
    inputs[11][:, :, :] = torch.nan
    inputs[8][:, :, :] = torch.nan
    whole = grown(*inputs)
    assert torch.isfinite(whole).all()
    inputs[7][1, 2:] = 0
    kept = inputs[7] != 0
    assert torch.equal(grown(*inputs)[kept], whole[kept])


def test_weights_of_any_size_are_loaded(grown):
    fresh = build_model(grown.config, small_schema()).eval()
    fresh.load_state_dict(grown.state_dict())
    inputs = random_inputs(5, 3, 40)
    assert torch.equal(fresh(*inputs), grown(*inputs))


def test_an_ensemble_is_the_mean_and_learns_as_the_network_alone(grown):
    config = EnsembleConfig(bahe=small_bahe(dropout=0.0), trees=SMALL)
    torch.manual_seed(0)
    model = build_model(config, small_schema(), small_deep_half())
    model.trees.load_state_dict(grown.state_dict())
    inputs = random_inputs(5, 3, 40)
    network = model.network.eval()(*inputs)
    torch.testing.assert_close(model.eval()(*inputs), (network + grown(*inputs)) / 2)
    named = ProgramInputs(*inputs)
    torch.manual_seed(1)  # the layers drop out while they learn
    learning = model.train().logits(named)
    torch.manual_seed(1)
    assert torch.equal(learning, model.network.logits(named))
    # What the network wants to learn beside clicks is learned here, too.
    clicked = (torch.arange(int((inputs[7] != 0).sum())) % 3 == 0).float()
    model.logits(named)
    learned = model.auxiliary_loss(clicked)
    model.network.logits(named)
    assert learned > 0
    assert learned == model.network.auxiliary_loss(clicked)
    assert model.auxiliary_loss(clicked) is None  # one pass, one loss


def test_a_run_of_no_epochs_writes_an_artifact_that_loads_again(tmp_path):
    sources = make_world(tmp_path / "home", num_users=120).sources
    recipe = replace(RECIPES["trees"](), model=replace(SMALL, num_trees=8))
    data = read_splits(sources, recipe.sequence_length)
    result = train(sources, recipe, run="grown", threads=1, make_current=True, data=data)
    assert result.history == []
    assert result.rows_per_s is None
    assert current_run(sources.home) == "grown"
    # What reads like the history is clicked, and evidence of texts says so.
    assert result.metrics["test"]["auc"] > 0.8
    manifest = load_run_manifest(sources.home, "grown")
    model = load_model(sources, manifest)
    assert int(model.ensemble.num_trees) >= 1
    calibrated = CalibratedModel(model, manifest.calibration)
    table = torch.from_numpy(sources.table.vectors)
    eager = score(calibrated, table, data["test"], truncate=True)
    program = load_artifact(sources.home, "grown").score
    np.testing.assert_allclose(
        score(program, table, data["test"], truncate=False), eager, atol=1e-5
    )
