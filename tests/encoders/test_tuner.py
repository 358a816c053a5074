"""The loss by hand, the schedule, and what a step draws."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from encoders.batches import TokenizedTexts
from encoders.config import TuningConfig
from encoders.pretrained import load_model
from encoders.tuner import Tuner, co_occurrence_loss
from tests.encoders.planted import sparse


def test_the_loss_by_hand() -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(4, 3))
    counts = np.array([[0, 2, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [3, 0, 1, 0]], dtype=float)
    popularity = np.array([1.0, 2.0, 5.0, 3.0])
    expected = []
    for i in range(4):
        if counts[i].sum() == 0:
            continue
        scores = {}
        for j in range(4):
            if j != i:
                cosine = vectors[i] @ vectors[j]
                cosine /= np.linalg.norm(vectors[i]) * np.linalg.norm(vectors[j])
                scores[j] = popularity[j] * math.exp(cosine / 0.1)
        target = {j: counts[i, j] / counts[i].sum() for j in scores if counts[i, j]}
        total, everyone = sum(scores.values()), sum(popularity[j] for j in scores)
        divergence = sum(p * math.log(p * total / scores[j]) for j, p in target.items())
        chance = sum(p * math.log(p * everyone / popularity[j]) for j, p in target.items())
        expected.append(divergence - chance)
    pairs, baskets = torch.tensor(counts), torch.tensor(popularity)
    points = torch.tensor(vectors, requires_grad=True)
    loss = co_occurrence_loss(points, pairs, baskets, temperature=0.1)
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-9)
    loss.backward()  # type: ignore[no-untyped-call]
    assert points.grad is not None
    assert torch.isfinite(points.grad).all()
    equal = torch.ones(4, 3, dtype=torch.float64)
    assert co_occurrence_loss(equal, pairs, baskets, temperature=0.1).item() == pytest.approx(0)
    assert co_occurrence_loss(points, pairs * 0, baskets, 0.1).item() == 0


def test_a_batch_holds_pairs_however_many_texts_there_are(bert_folder: Path) -> None:
    num = 20_000
    data = sparse(num, {row: {row ^ 1: 1.0} for row in range(num)})
    tokens = TokenizedTexts(np.ones(num, dtype=np.int64), np.ones(num, dtype=np.int64))
    tuner = Tuner(load_model(str(bert_folder)), 2, tokens, 0, data, TuningConfig(batch_texts=64))
    rows = tuner.draw(0)
    assert len(rows) == len(set(rows.tolist())) == 64
    assert (data.block(rows).sum(axis=1) > 0).mean() > 0.95
    np.testing.assert_array_equal(rows, tuner.draw(0))
    assert set(rows.tolist()) != set(tuner.draw(1).tolist())
