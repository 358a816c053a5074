import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from encoders.loaded_artifact import read_program
from feature_repo.artifact import Calibration
from tests.training.world import random_inputs, small_schema
from training.build import build_model
from training.calibration import (
    MIN_SLOPE,
    CalibratedModel,
    Calibrator,
    calibrate,
    fit_calibration,
    fit_platt,
    inverse,
)
from training.config import PopularityConfig
from training.metrics import logloss
from training.program import save_program
from training.scoring import probabilities


def draw(seed=0, num=6000, users=100):
    """Logits that are right, their labels and users."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(-1, 1.5, num).astype(np.float32)
    labels = (generator.random(num) < probabilities(logits)).astype(np.int64)
    return logits, labels, generator.integers(0, users, num)


def test_platt_maximises_the_likelihood_of_its_targets():
    logits, labels, _ = draw(num=300)
    slope, bias = fit_platt(logits, labels)
    clicked = labels.sum()
    target = np.where(labels == 1, (clicked + 1) / (clicked + 2), 1 / (300 - clicked + 2))

    def loss(line):
        z = line[0] * logits.astype(float) + line[1]
        return float(np.sum(np.logaddexp(0, z) - target * z))

    assert [slope, bias] == pytest.approx(minimize(loss, [1, 0]).x, abs=1e-3)


def test_platt_of_separable_scores_is_finite_and_never_turns_the_order_round():
    labels = np.array([0, 0, 0, 1, 1, 1])
    slope, _ = fit_platt(np.arange(6.0), labels)
    assert 0 < slope < 100
    slope, bias = fit_platt(-np.arange(6.0), labels)
    assert slope == MIN_SLOPE
    assert bias == pytest.approx(0.0025)  # the mean logit is that of the rate, one half


def test_a_stretched_and_shifted_model_gets_platts_line():
    logits, labels, users = draw()
    found = fit_calibration(2 * logits + 3, labels, users)
    assert found.method == "platt"
    assert (found.slope_below, found.values[0]) == pytest.approx((0.5, -1.5), abs=0.15)
    losses = found.cross_validated_logloss
    assert losses["platt"] < losses["none"] - 0.1
    assert losses["platt"] == pytest.approx(logloss(labels, probabilities(logits)), abs=0.005)


def test_a_bent_model_gets_the_isotonic_map():
    logits, labels, users = draw()
    bent = np.where(logits < -1, logits * 5, logits * 0.2).astype(np.float32)
    found = fit_calibration(bent, labels, users)
    assert found.method == "isotonic"
    losses = found.cross_validated_logloss
    assert losses["isotonic"] < losses["platt"] < losses["none"]
    fresh, fresh_labels, _ = draw(seed=1)
    bent = np.where(fresh < -1, fresh * 5, fresh * 0.2).astype(np.float32)
    after = probabilities(calibrate(found, bent).astype(np.float32))
    best = logloss(fresh_labels, probabilities(fresh))
    assert best - 0.01 < logloss(fresh_labels, after) < best + 0.01
    assert logloss(fresh_labels, probabilities(bent)) > best + 0.05


def test_a_model_that_is_right_stays_as_it_is():
    logits, labels, users = draw()
    found = fit_calibration(logits, labels, users)
    assert found.method == "none"
    assert set(found.cross_validated_logloss) == {"none", "platt", "isotonic"}


def test_what_cannot_be_fitted_stays_as_it_is():
    logits, labels, users = draw(num=50)
    for found in (
        fit_calibration(logits * 9, np.zeros_like(labels), users),  # one class
        fit_calibration(logits * 9, labels, np.zeros(50, dtype=np.int64)),  # one user
    ):
        assert found.method == "none"
        assert found.cross_validated_logloss == {}
        np.testing.assert_array_equal(calibrate(found, logits), logits)
        np.testing.assert_array_equal(Calibrator(found)(torch.from_numpy(logits)), logits)


POSITIVE = st.floats(0.01, 20)


@st.composite
def maps(draw_value):
    num = draw_value(st.integers(1, 6))
    steps = [draw_value(st.lists(POSITIVE, min_size=num, max_size=num)) for _ in range(2)]
    knots, values = (np.cumsum(step) - 30 for step in steps)
    return Calibration(
        method="isotonic",
        knots=tuple(knots.tolist()),
        values=tuple(values.tolist()),
        slope_below=draw_value(POSITIVE),
        slope_above=draw_value(POSITIVE),
    )


@settings(derandomize=True, max_examples=60, deadline=None)
@given(maps())
def test_the_module_the_arrays_and_the_inverse_agree(calibration):
    logits = np.linspace(-60, 60, 500).astype(np.float32)
    expected = calibrate(calibration, logits)
    assert (np.diff(expected) > 0).all()
    np.testing.assert_allclose(
        calibrate(calibration, np.array(calibration.knots)), calibration.values, rtol=1e-12
    )
    found = Calibrator(calibration)(torch.from_numpy(logits).reshape(50, 10))
    np.testing.assert_allclose(found.numpy().ravel(), expected, rtol=1e-4, atol=1e-3)
    back = calibrate(inverse(calibration), expected)
    np.testing.assert_allclose(back, logits, rtol=1e-9, atol=1e-9)


def test_the_ranking_stays_in_float32():
    logits, labels, users = draw()
    bent = np.where(logits < -1, logits * 5, logits * 0.2).astype(np.float32)
    calibrator = Calibrator(fit_calibration(bent, labels, users))
    spaced = torch.linspace(-30, 10, 40_001)
    assert (calibrator(spaced).diff() > 0).all()


def test_the_exported_program_applies_the_map(tmp_path):
    schema = small_schema()
    model = build_model(PopularityConfig(), schema)
    calibration = Calibration(
        method="isotonic", knots=(2.0, 3.0), values=(-3.0, 1.0), slope_below=0.3, slope_above=2.0
    )
    save_program(CalibratedModel(model, calibration), schema, tmp_path / "score.pt2")
    inputs = random_inputs(5, 3, 9)
    inputs[8] = inputs[8].abs() * 20  # counts, so that the logits meet every piece of the map
    with torch.inference_mode():
        raw = model(*inputs).numpy()
        found = read_program(tmp_path / "score.pt2").module()(*inputs).numpy()
    assert raw.min() < 2
    assert raw.max() > 3
    np.testing.assert_allclose(found, calibrate(calibration, raw), rtol=1e-5, atol=1e-5)


def test_a_map_survives_the_manifest():
    logits, labels, users = draw(num=500)
    found = fit_calibration(logits, labels, users)
    assert Calibration.model_validate_json(found.model_dump_json()) == found
