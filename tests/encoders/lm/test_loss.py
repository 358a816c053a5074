"""The chunked loss equals plain cross-entropy, its gradients too; packed rows equal documents."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from encoders.lm import loss as loss_module
from encoders.lm.loss import IGNORED, LanguageModelLoss
from tests.encoders.lm.planted_models import small_model


def block(rows: int, length: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randint(0, 264, (2, rows, length), generator=random)
    targets[torch.rand(rows, length, generator=random) < 0.3] = IGNORED
    return inputs, targets


def plain(model: torch.nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    logits = model(input_ids=inputs).logits.flatten(0, 1)
    return functional.cross_entropy(
        logits, targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_loss_and_gradients_equal_plain_cross_entropy(
    tied: bool, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_LOGITS", 264 * chunk_rows)
    monkeypatch.setattr(loss_module, "_BLOCK_LOGITS", 264 * 3 * chunk_rows)
    inputs, targets = block(3, 17)
    ours, theirs = small_model(), small_model()
    for model in (ours, theirs):
        if tied:
            model.lm_head.weight = model.model.embed_tokens.weight
    nats = LanguageModelLoss(ours)(inputs, targets)
    expected = plain(theirs, inputs, targets)
    torch.testing.assert_close(nats, expected, rtol=1e-5, atol=1e-4)
    (nats / 3).backward()
    (expected / 3).backward()
    expected_gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected_gradients[name].grad, rtol=1e-4, atol=1e-5, msg=name
        )


def test_by_token_adds_up_to_the_sum() -> None:
    inputs, targets = block(2, 9)
    loss = LanguageModelLoss(small_model())
    each = loss(inputs, targets, by_token=True)
    assert each.shape == targets.shape
    assert not each.requires_grad
    assert (each[targets == IGNORED] == 0).all()
    torch.testing.assert_close(each.sum(), loss(inputs, targets).detach())


def test_bfloat16_is_near() -> None:
    inputs, targets = block(4, 32)
    loss = LanguageModelLoss(small_model())
    exact = loss(inputs, targets)
    exact.backward()
    weight = loss.model.lm_head.weight
    gradient = weight.grad.clone()
    weight.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = loss(inputs, targets)
    near.backward()
    assert near.dtype == torch.float32
    torch.testing.assert_close(near, exact, rtol=0.02, atol=0)
    assert functional.cosine_similarity(weight.grad.flatten(), gradient.flatten(), dim=0) > 0.999


def test_nothing_to_learn_gives_zero() -> None:
    inputs, targets = block(2, 5)
    nats = LanguageModelLoss(small_model())(inputs, torch.full_like(targets, IGNORED))
    nats.backward()
    assert nats == 0
