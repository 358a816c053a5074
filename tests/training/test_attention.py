import math

import torch
from torch.export import Dim
from torch.nn.functional import normalize

from training.attention import TargetAttention

B, S, M, C, D = 3, 2, 5, 4, 8


def make():
    torch.manual_seed(1)
    attention = TargetAttention(D, S, num_heads=2, head_width=3, num_age_buckets=4)
    with torch.no_grad():  # no parameter may hide behind its start
        for parameter in attention.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attention


def make_inputs():
    generator = torch.Generator().manual_seed(2)
    keep = torch.rand(B, S, M, generator=generator) < 0.6
    keep[0, 0] = False  # a scene without anything
    keep[1, 1] = True
    return {
        "history": normalize(torch.randn(B, S, M, D, generator=generator), dim=-1),
        "ages": torch.rand(B, S, M, generator=generator) * 40_000,
        "keep": keep,
        "candidates": normalize(torch.randn(B, C, D, generator=generator), dim=-1),
        "cosines": torch.rand(B, S, C, M, generator=generator) * 2 - 1,
        "same": torch.rand(B, S, C, M, generator=generator) < 0.3,
    }


def slow_reference(attention, history, ages, keep, candidates, cosines, same):
    """The equation of the docstring, one number at a time."""
    scale = math.sqrt(D)
    heads, width = attention.num_heads, attention.head_width
    buckets = attention.age.buckets(ages)
    result = torch.zeros(B, C, S, heads, width)
    for b in range(B):
        for c in range(C):
            query = attention.query(scale * candidates[b, c])
            for s in range(S):
                both = [attention.key_value(scale * v) for v in history[b, s]]
                for h in range(heads):
                    part = slice(h * width, (h + 1) * width)
                    total = math.exp(attention.null_logit[s, h])
                    found = torch.zeros(width)
                    for m in range(M):
                        if not keep[b, s, m]:
                            continue
                        key, value = both[m][: heads * width], both[m][heads * width :]
                        logit = query[part] @ key[part] / math.sqrt(width)
                        logit += attention.cosine_weight[s, h] * cosines[b, s, c, m]
                        logit += attention.same_weight[s, h] * same[b, s, c, m]
                        logit += attention.age.table.weight[buckets[b, s, m], h]
                        total += math.exp(logit)
                        found += math.exp(logit) * value[part]
                    result[b, c, s, h] = found / total
    return result.flatten(2)


def test_equals_the_equation_one_number_at_a_time():
    attention, inputs = make(), make_inputs()
    found = attention(**inputs)
    assert found.shape == (B, C, attention.output_width)
    with torch.no_grad():
        expected = slow_reference(attention, **inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_an_empty_scene_gives_zeros_and_finite_gradients():
    attention, inputs = make(), make_inputs()
    found = attention(**inputs)
    assert (found.unflatten(-1, (S, -1))[0, :, 0] == 0).all()
    assert (found.unflatten(-1, (S, -1))[0, :, 1] != 0).any()
    found.square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name


def test_padding_takes_no_gradient_and_changes_nothing():
    attention, inputs = make(), make_inputs()
    inputs["history"].requires_grad_()
    inputs["ages"].requires_grad_()
    inputs["cosines"].requires_grad_()
    found = attention(**inputs)
    found.square().sum().backward()
    keep = inputs["keep"]
    gradient = inputs["history"].grad
    assert (gradient[~keep] == 0).all()
    assert (gradient[keep].abs().sum(-1) > 0).all()
    assert (inputs["cosines"].grad.transpose(2, 3)[~keep] == 0).all()
    other = dict(inputs)
    with torch.no_grad():
        other["history"] = torch.where(keep.unsqueeze(-1), inputs["history"], 7.0)
        other["ages"] = torch.where(keep, inputs["ages"], 1e9)
        other["same"] = inputs["same"] | ~keep.unsqueeze(2)
        assert torch.equal(attention(**other), found)


def test_a_large_null_logit_sends_attention_nowhere():
    attention, inputs = make(), make_inputs()
    with torch.no_grad():
        attention.null_logit.fill_(50.0)
    assert attention(**inputs).abs().max() < 1e-9


def test_no_intermediate_is_larger_than_the_logits():
    """With many candidates and behaviours a [B, C, M, D] tensor would be four times as large."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (result,) if isinstance(t, torch.Tensor))
            return result

    attention = TargetAttention(32, 1, num_heads=2, head_width=4)
    shape = (2, 1, 20, 30)
    with Watch():
        attention(
            torch.randn(2, 1, 30, 32),
            torch.rand(2, 1, 30),
            torch.ones(2, 1, 30, dtype=torch.bool),
            torch.randn(2, 20, 32),
            torch.rand(shape),
            torch.rand(shape) < 0.5,
        )
    assert max(sizes) <= 2 * 2 * 20 * (30 + 1)


def test_exported_it_takes_any_number_of_contexts_and_candidates():
    attention, inputs = make(), make_inputs()
    contexts, candidates = Dim("contexts"), Dim("candidates")
    shapes = {name: {0: contexts} for name in inputs}
    shapes["candidates"][1] = candidates
    shapes["cosines"][2] = shapes["same"][2] = candidates
    program = torch.export.export(attention, (), kwargs=inputs, dynamic_shapes=shapes).module()
    fewer = {name: value[:1] for name, value in inputs.items()}
    fewer["candidates"] = fewer["candidates"][:, :1]
    fewer["cosines"], fewer["same"] = fewer["cosines"][:, :, :1], fewer["same"][:, :, :1]
    for asked in (inputs, fewer):
        torch.testing.assert_close(program(**asked), attention(**asked))
