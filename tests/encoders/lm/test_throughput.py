"""Operations are counted by hand, and the rate is that of real products."""

from collections import Counter

import torch

from encoders.lm.model import make_model
from encoders.lm.throughput import (
    card_peak,
    measure_products,
    operations_per_token,
    product_shapes,
)
from tests.encoders.lm.planted_models import byte_tokenizer
from tests.encoders.lm.small_corpus import small


def test_operations_are_six_per_weight_of_every_product() -> None:
    model = make_model(small().shape, byte_tokenizer(), seed=0)
    shapes = product_shapes(model)
    assert shapes == {(32, 32): 4, (16, 32): 4, (64, 32): 4, (32, 64): 2, (260, 32): 1}
    by_hand = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64) + 260 * 32
    assert operations_per_token(shapes) == 6 * by_hand


def test_the_rate_is_between_slow_and_impossible() -> None:
    device = torch.device("cpu")
    large, thin = (
        measure_products(Counter([shape]), num_tokens=512, precision="float32", device=device)
        for shape in ((256, 256), (256, 2))
    )
    assert 1e8 < large < 1e14
    assert thin < large  # thin products cannot use the arithmetic
    assert card_peak(device) is None


def test_a_mixture_of_shapes_lies_between_them() -> None:
    device = torch.device("cpu")
    both = Counter({(256, 256): 1, (256, 2): 40})
    mixed = measure_products(both, num_tokens=512, precision="float32", device=device)
    assert mixed < measure_products(
        Counter({(256, 256): 1}), num_tokens=512, precision="float32", device=device
    )
