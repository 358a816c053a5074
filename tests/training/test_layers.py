import math

import numpy as np
import pytest
import torch

from training.layers import (
    AgeEmbedding,
    LowRankCross,
    MemberPerceptron,
    PiecewiseLinear,
    RunningNorm,
    TableSpace,
    masked_mean,
    quantile_edges,
)
from training.text_evidence import TextEvidence


def test_quantile_edges_of_many_few_and_no_values():
    values = np.full((101, 3), np.nan, np.float32)
    values[:, 0] = np.arange(101)
    values[:50, 1] = np.repeat([1, 2], 25)
    edges = quantile_edges(values, 4)
    assert edges[0].tolist() == [0, 25, 50, 75, 100]
    assert edges[1].tolist() == [1, 1.5, 2, 2, 2]
    assert edges[2].tolist() == [0] * 5


def test_piecewise_linear_equals_the_papers_equation():
    layer = PiecewiseLinear(1, num_bins=4, width=3)
    layer.set_edges(np.arange(101, dtype=np.float32)[:, None])
    with torch.no_grad():
        layer.skip.normal_()
    for x in (-5.0, 0.0, 10.0, 60.0, 1e9):
        bins = [min(max((x - edge) / 25, 0), 1) for edge in (0, 25, 50, 75)]
        channels = torch.tensor([*bins, 0.0])
        encoded, logit = layer(torch.tensor([[x]]))
        torch.testing.assert_close(encoded[0], channels @ layer.weight[0])
        torch.testing.assert_close(logit[0], channels @ layer.skip[0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_piecewise_linear_gives_what_is_missing_a_channel_of_its_own(value):
    layer = PiecewiseLinear(1, num_bins=4, width=3)
    layer.set_edges(np.arange(101, dtype=np.float32)[:, None])
    encoded, _ = layer(torch.tensor([[value]]))
    torch.testing.assert_close(encoded[0], layer.weight[0, -1])


def test_low_rank_cross_equals_the_papers_equation():
    cross = LowRankCross(5, rank=2, num_layers=2)
    x0 = torch.randn(3, 5)
    for row, found in zip(x0, cross(x0), strict=True):
        x = row
        for down, up in zip(cross.down, cross.up, strict=True):
            x = row * (up.weight @ (down.weight @ x) + up.bias) + x
        torch.testing.assert_close(found, x)
    with pytest.raises(ValueError, match=r"rank must be in \[1, 5\]"):
        LowRankCross(5, rank=6, num_layers=1)


def test_running_norm_learns_and_scores_with_the_same_statistics():
    norm = RunningNorm(2)
    batches = [torch.randn(50, 2) * 3 + 5, torch.randn(70, 2) + 1]
    norm(batches[0])
    found = norm(batches[1])
    mean = (batches[0].mean(0) + batches[1].mean(0)) / 2
    square = (batches[0].square().mean(0) + batches[1].square().mean(0)) / 2
    expected = (batches[1] - mean) / (square - mean**2).sqrt()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(norm.eval()(batches[1]), expected)
    norm.train()(torch.zeros(3, 2)).sum().backward()  # statistics are no obstacle to gradients
    assert torch.isfinite(norm.weight.grad).all()


def test_age_buckets_double():
    hours = torch.tensor([0, 0.9, 1.5, 3, 5, 2.0**20]) * 3600
    assert AgeEmbedding(16, 2).buckets(hours).tolist() == [0, 0, 1, 2, 3, 15]


def test_masked_mean_of_nothing_is_zero():
    values = torch.tensor([[[1.0, 2.0], [3.0, 6.0]], [[1.0, 1.0], [1.0, 1.0]]])
    keep = torch.tensor([[False, True], [False, False]])
    assert masked_mean(values, keep).tolist() == [[3, 6], [0, 0]]


def test_table_space_centres_directions_and_scales_unit_vectors_only():
    vectors = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32) + 5
    space = TableSpace(4)
    space.set_statistics(np.concatenate([np.zeros((1, 4), np.float32), vectors]))
    table = torch.from_numpy(vectors)
    assert torch.equal(space(table), table)
    centered = vectors - vectors.mean(0)
    expected = centered / np.linalg.norm(centered, axis=1, keepdims=True)
    np.testing.assert_allclose(space.directions(table).numpy(), expected, atol=1e-5)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    space.set_statistics(np.concatenate([np.zeros((1, 4), np.float32), unit]))
    np.testing.assert_allclose(space(torch.from_numpy(unit)).numpy(), unit * 2, rtol=1e-5)


def test_text_evidence_by_hand_and_without_a_history():
    evidence = TextEvidence(num_kernels=2, num_scales=1)
    cosines = torch.tensor([[0.5, 0.9, 0.1]])
    keep = torch.tensor([[True, False, True]])
    decays = torch.tensor([[[1.0], [1.0], [0.5]]])
    found = evidence(cosines, keep, decays)[0]
    widths = evidence.log_widths.exp().tolist()
    kernels = [
        math.log1p(
            math.exp(-0.5 * ((0.5 - center) / width) ** 2)
            + 0.5 * math.exp(-0.5 * ((0.1 - center) / width) ** 2)
        )
        for center, width in zip(evidence.centers.tolist(), widths, strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor([0.5, 0.3, *kernels]))
    nothing = evidence(cosines, torch.zeros_like(keep), decays)
    assert nothing.tolist() == [[0] * 4]


def test_member_perceptron_by_hand():
    torch.manual_seed(0)
    head = MemberPerceptron(5, hidden=(4, 3), dropout=0.0, num_members=2, use_bfloat16=False)
    assert set(head.scale.flatten().tolist()) == {-1.0, 1.0}
    head.set_base_rate(0.25)
    x = torch.randn(7, 5)
    found = head(x)
    second = head.layers[2]
    for member in range(2):
        h = torch.nn.functional.gelu(head.first(x * head.scale[member]))
        h = torch.nn.functional.gelu(second(h))
        expected = h @ head.output[member] + math.log(0.25 / 0.75)
        torch.testing.assert_close(found[:, member], expected)
    with pytest.raises(ValueError, match="at least one width"):
        MemberPerceptron(5, hidden=(), dropout=0.0, num_members=2, use_bfloat16=False)


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_a_projected_cross_is_the_projection_of_the_cross(num_layers):
    torch.manual_seed(0)
    cross = LowRankCross(10, rank=3, num_layers=num_layers)
    onto = torch.nn.Linear(10, 1)
    x = torch.randn(7, 10)
    torch.testing.assert_close(cross.project(x, onto), onto(cross(x)))
