"""Batches are functions of the step, hold the mixture's shares, and lose no token."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from encoders.lm.loss import IGNORED, LanguageModelLoss
from encoders.lm.packing import PackedRows, TokenStream, pack
from encoders.lm.shards import TokenShard
from feature_repo.errors import EncoderError
from tests.encoders.lm.planted_models import small_model

START = 0


def shard(lengths: list[int], *, first: int = 1) -> TokenShard:
    """Documents of distinct tokens, from ``first`` on, so that each token tells its place."""
    stops = np.cumsum(np.array(lengths, dtype=np.int64))
    tokens = np.arange(first, first + int(stops[-1]), dtype=np.uint16)
    return TokenShard(tokens, stops, np.array(lengths, dtype=np.int64))


def stream(shards: dict[str, TokenShard], **changes: Any) -> TokenStream:
    settings: dict[str, Any] = {
        "start": START,
        "sequence_length": 16,
        "batch_rows": 4,
        "seed": 0,
        **changes,
    }
    weights = settings.pop("weights", dict.fromkeys(shards, 1.0))
    return TokenStream(shards, weights, **settings)


def kept(rows: PackedRows) -> list[int]:
    found: list[int] = rows.targets[rows.targets != IGNORED].tolist()
    return found


def test_every_epoch_has_every_token_once_in_another_order() -> None:
    lengths = [3, 1, 40, 7, 12, 2, 5]
    batches = stream({"one": shard(lengths)}, batch_rows=2)
    tokens: list[int] = []
    step = 0
    while len(tokens) < 3 * sum(lengths):
        tokens += kept(batches.batch(step))
        step += 1
    epochs = [tokens[i * 70 : (i + 1) * 70] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(1, 71))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_inputs_are_the_tokens_before_and_positions_begin_with_each_document() -> None:
    lengths = [3, 1, 40, 7, 12]
    batches = stream({"one": shard(lengths)})
    begins = {1 + sum(lengths[:i]) for i in range(len(lengths))}
    for step in range(5):
        rows = batches.batch(step)
        for row in range(4):
            before = None
            for given, told, place in zip(
                rows.inputs[row].tolist(),
                rows.targets[row].tolist(),
                rows.positions[row].tolist(),
                strict=True,
            ):
                if told == IGNORED:
                    continue
                assert given == (START if told in begins else told - 1)
                if told in begins:
                    assert place == 0
                elif before is not None and told == before[0] + 1:
                    assert place == before[1] + 1  # the same document goes on
                before = (told, place)
            assert rows.positions[row, 0] == 0


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    shards = {"one": shard([5] * 40), "two": shard([9] * 30, first=1000)}
    forward = [stream(shards).batch(step) for step in range(8)]
    batches = stream(shards)
    for step in (7, 2, 5, 0):
        assert torch.equal(batches.batch(step).targets, forward[step].targets)
        assert torch.equal(batches.batch(step).inputs, forward[step].inputs)
        assert torch.equal(batches.batch(step).positions, forward[step].positions)
    other = stream(shards, seed=1).batch(0)
    assert not torch.equal(other.targets, forward[0].targets)


def test_every_batch_holds_the_mixture() -> None:
    shards = {"one": shard([5] * 40), "two": shard([9] * 30, first=1000), "none": shard([4])}
    batches = stream(shards, weights={"one": 3, "two": 1, "none": 0}, batch_rows=8)
    assert batches.shares == {"one": 0.75, "two": 0.25}
    total: Counter[str] = Counter()
    for step in range(30):
        tokens = kept(batches.batch(step))
        ones = sum(token < 1000 for token in tokens)
        assert abs(ones / len(tokens) - 0.75) < 0.02
        total["one"] += ones
        total["two"] += len(tokens) - ones
    # 126 tokens a step: 128 less room for one more of each source.
    assert abs(total["one"] - 30 * 126 * 0.75) <= 1
    assert abs(total["two"] - 30 * 126 * 0.25) <= 1


def test_packed_rows_have_the_loss_of_their_documents_one_by_one() -> None:
    documents = [np.arange(5, 5 + n) for n in (3, 9, 1, 14, 20, 6)]
    inputs = np.concatenate([[START, *document[:-1]] for document in documents])
    begins = np.zeros(len(inputs), dtype=bool)
    begins[np.cumsum([0, *(len(document) for document in documents[:-1])])] = True
    rows = pack(inputs, np.concatenate(documents), begins, rows=1, length=64)
    assert int((rows.targets == IGNORED).sum()) == 64 - 53
    loss = LanguageModelLoss(small_model())
    together = loss(rows.inputs, rows.targets, rows.positions)
    together.backward()
    gradients = {name: p.grad.clone() for name, p in loss.named_parameters()}
    loss.zero_grad()
    one_by_one = torch.zeros(())
    for document in documents:
        given = torch.tensor([[START, *document[:-1]]])
        nats = loss(given, torch.from_numpy(document)[None])
        nats.backward()
        one_by_one += nats.detach()
    torch.testing.assert_close(together.detach(), one_by_one, rtol=1e-5, atol=1e-4)
    for name, parameter in loss.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4, msg=name)
    # And attention across documents would be noticed.
    across = loss(rows.inputs, rows.targets)
    assert (across - together).abs().item() > 1


def test_sentences() -> None:
    with pytest.raises(EncoderError, match="the corpus has no documents to learn from"):
        stream({"one": TokenShard(np.empty(0, np.uint16), np.empty(0, int), np.empty(0, int))})
    shards = {f"s{i}": shard([5]) for i in range(9)}
    with pytest.raises(EncoderError, match="too small for 9 sources: raise --batch-rows"):
        stream(shards, batch_rows=1)
