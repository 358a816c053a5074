"""Bins, the stability index, what chance gives, and memory that does not grow with the rows."""

import math
import tracemalloc
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from feature_repo.drift import (
    Collector,
    Distribution,
    Reference,
    compare,
    cosine_distance,
    psi,
    psi_by_chance,
    quantile_edges,
)

MOMENT = datetime(2024, 1, 1, tzinfo=UTC)
NUM_FEATURES = 24


def test_psi_by_hand() -> None:
    # (0.5 - 0.25) ln 2 + (0.5 - 0.75) ln (2 / 3)
    expected = 0.25 * math.log(2) - 0.25 * math.log(2 / 3)
    many = 10**9
    assert psi([50 * many, 50 * many], [many, 3 * many]) == pytest.approx(expected, rel=1e-7)
    assert psi([3, 5, 0], [3, 5, 0]) == 0
    # Of two bins a whole row goes to the shares together, 0.5 and 0.5.
    p, q = 100.5 / 101, 0.5 / 101
    assert psi([100, 0], [0, 100]) == pytest.approx(2 * (p - q) * math.log(p / q), rel=1e-12)


@settings(derandomize=True, max_examples=50)
@given(
    st.lists(st.integers(0, 1000), min_size=2, max_size=12).filter(any),
    st.data(),
)
def test_psi_is_symmetric_and_never_negative(first: list[int], data: st.DataObject) -> None:
    whole = st.lists(st.integers(0, 1000), min_size=len(first), max_size=len(first)).filter(any)
    second = data.draw(whole)
    assert psi(first, second) >= 0
    assert psi(first, second) == pytest.approx(psi(second, first), abs=1e-12)
    assert psi(first, [7 * n for n in first]) == pytest.approx(0, abs=1e-12)


def test_bins_are_deciles_and_a_value_that_repeats_has_its_own() -> None:
    values = np.arange(1000.0)
    found = Distribution.of_edges(quantile_edges(values)).plus(values)
    assert found.counts == (100,) * 10 + (0,)
    mostly_zero = np.r_[np.zeros(700), np.arange(1, 301), np.nan]
    found = Distribution.of_edges(quantile_edges(mostly_zero)).plus(mostly_zero)
    assert found.counts[:2] == (0, 700)
    assert found.counts[-1] == 1
    assert found.missing_rate == pytest.approx(1 / 1001)
    # A constant: below, at and above it are three bins.
    constant = Distribution.of_edges(quantile_edges(np.full(9, 5.0, np.float32)))
    assert constant.plus(np.array([4.0, 5, 5, 6, np.nan], np.float32)).counts == (1, 2, 1, 1)
    assert quantile_edges(np.full(3, np.nan)) == (0.0,)


def test_categories_are_counted_by_index() -> None:
    found = Distribution.of_categories(3).plus(np.array([0.0, 1, 1, 3, np.nan]))
    assert found.counts == (1, 2, 0, 1, 1)


def test_a_document_whose_bins_do_not_fit_is_refused() -> None:
    with pytest.raises(ValidationError, match="2 edges need 4 counts"):
        Distribution(edges=(1.0, 2.0), counts=(1, 2))


def sample(rng: np.random.Generator, num: int, shift: float = 0) -> dict[str, NDArray[np.float32]]:
    """Normal, skewed, discrete and half-missing features; the first ones shifted."""
    columns: dict[str, NDArray[np.float32]] = {}
    for place in range(NUM_FEATURES):
        values = (
            rng.normal(size=num), rng.exponential(size=num), rng.poisson(0.4, num).astype(float),
            np.where(rng.random(num) < 0.5, np.nan, rng.normal(size=num)),
        )[place % 4]  # fmt: skip
        columns[f"f{place}"] = (values + shift * (place == 0)).astype(np.float32)
    return columns


def reference(columns: dict[str, NDArray[np.float32]], like: Reference | None = None) -> Reference:
    """The distributions of columns, in bins of their own or of ``like``."""
    if like is None:
        bins = {name: Distribution.of_edges(quantile_edges(v)) for name, v in columns.items()}
    else:
        bins = like.distributions["user"]
    collector = Collector({"user": bins})
    collector.add("user", columns.items())
    num = len(columns["f0"])
    collector.add_vectors("history", np.array([3.0, 4.0]) * num, num)
    return Reference(
        start=MOMENT, end=MOMENT, num_rows=num, num_contexts=num,
        distributions=collector.distributions, mean_vectors=collector.mean_vectors,
    )  # fmt: skip


@pytest.mark.parametrize("num", [60, 1000, 8000])
def test_equal_data_raises_no_alarm(num: int) -> None:
    rng = np.random.default_rng(0)
    before = reference(sample(rng, 10_000))
    for _ in range(5):
        now = reference(sample(rng, num), before)
        assert compare(before, now, threshold=0.02).drifted == ()


def test_a_planted_shift_is_found_and_nothing_else() -> None:
    rng = np.random.default_rng(1)
    before = reference(sample(rng, 20_000))
    found = compare(before, reference(sample(rng, 2000, shift=0.6), before), threshold=0.2)
    assert found.drifted == ("user.f0",)
    feature = found.features["user"]["f0"]
    # Of normals with means d apart it is d^2 = 0.36; ten bins keep most of it.
    assert 0.28 < feature.psi < 0.42
    assert feature.by_chance is not None
    assert feature.by_chance < 0.05
    assert found.vectors == {"history": pytest.approx(0, abs=1e-12)}
    # So few rows tell nothing, whatever the index says.
    few = compare(before, reference(sample(rng, 12, shift=0.6), before), threshold=0.01)
    assert few.features["user"]["f0"].psi > 0.01
    assert few.drifted == ()


def test_a_feature_tells_its_view() -> None:
    before = reference(sample(np.random.default_rng(6), 100))
    views = {"user": {"f0": "user_stats"}, "item": {"f1": "items"}}
    found = compare(before, before, threshold=0.2, views=views).features["user"]
    assert (found["f0"].view, found["f1"].view) == ("user_stats", None)


def test_values_that_go_missing_are_drift() -> None:
    rng = np.random.default_rng(2)
    before = reference(sample(rng, 5000))
    columns = sample(rng, 1000)
    columns["f1"][:300] = np.nan
    found = compare(before, reference(columns, before), threshold=0.2)
    assert found.drifted == ("user.f1",)
    assert found.features["user"]["f1"].missing_now == pytest.approx(0.3)
    assert found.features["user"]["f1"].missing_before == 0


def test_chance_is_that_of_the_chi_square() -> None:
    """Of many pairs of equal samples about one in a thousand is beyond the bound."""
    rng = np.random.default_rng(3)
    shares = np.full(10, 0.1)
    first = rng.multinomial(5000, shares, size=4000)
    second = rng.multinomial(800, shares, size=4000)
    bound = psi_by_chance(10, 5000, 800, num_features=1)
    beyond = sum(psi(a.tolist(), b.tolist()) > bound for a, b in zip(first, second, strict=True))
    assert beyond <= 14
    loose = bound * 21.67 / 27.88  # the chi-square quantiles of 1 % and 0.1 % with 9 degrees
    beyond = sum(psi(a.tolist(), b.tolist()) > loose for a, b in zip(first, second, strict=True))
    assert 20 <= beyond <= 70
    assert psi_by_chance(10, 5000, 0, num_features=1) == math.inf


def test_mean_vectors_are_compared_by_direction() -> None:
    assert cosine_distance([1, 0], [5, 0]) == pytest.approx(0)
    assert cosine_distance([1, 0], [0, 2]) == pytest.approx(1)
    assert cosine_distance([1, 0], [-1, 0]) == pytest.approx(2)
    assert cosine_distance([1, 0], []) is None
    assert cosine_distance([1, 0], [0, 0]) is None
    before = reference(sample(np.random.default_rng(0), 100))
    turned = before.model_copy(update={"mean_vectors": {"history": (4.0, -3.0)}})
    assert compare(before, turned, threshold=0.2).drifted == ("vectors.history",)


def test_a_million_rows_take_the_memory_of_their_bins() -> None:
    rng = np.random.default_rng(4)
    bins = {f"f{n}": Distribution.of_edges(quantile_edges(rng.normal(size=1000))) for n in range(8)}
    collector = Collector({"user": bins})
    chunk = rng.normal(size=20_000).astype(np.float32)
    tracemalloc.start()
    for _ in range(50):
        collector.add("user", [(name, chunk) for name in bins])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert collector.distributions["user"]["f7"].num_rows == 1_000_000
    assert peak < 2e6


def test_a_reference_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory) -> None:
    before = reference(sample(np.random.default_rng(5), 500))
    path = tmp_path_factory.mktemp("reference") / "reference.json"
    before.save(path)
    assert Reference.load(path, made_by="longtrail train") == before
