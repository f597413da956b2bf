"""Weighted attention against the same keys repeated, and against its formula in float64."""

import math

import pytest
import torch
from atlasvid.engine.branch import weighted
from atlasvid.engine.branch.weighted import weighted_attention
from atlasvid.engine.comfyui import management, models
from hypothesis import given, settings
from hypothesis import strategies as st
from wan import rand

WEIGHTS = [0.5, 1, 8, 32, 128]
HEADS, DIM = 2, 16


@pytest.fixture(params=["merged", "biased"])
def way(request, monkeypatch):
    """By merging two attentions, or by a bias where no kernel gives its sums."""
    if request.param == "biased":
        monkeypatch.setattr(weighted, "_attention_with_sums", lambda q, k, v: None)
    else:
        monkeypatch.setattr(weighted, "_biased", None)
    return request.param


def tensors(windows, queries, keys, guide_keys, dtype=torch.float32, seed=0, device="cpu"):
    sizes = (queries, keys, keys, guide_keys, guide_keys)
    made = [rand(windows, n, HEADS * DIM, seed=seed + i) for i, n in enumerate(sizes)]
    made[0] *= 2  # so that some keys matter more than others
    q, k, v, guide_k, guide_v = (each.to(device, dtype) for each in made)
    return q, (k, v), (guide_k, guide_v)


def joined(own, guide, times=1):
    """Keys and values of both, the guide's so many times."""
    return [torch.cat([x, *[y] * times], 1) for x, y in zip(own, guide, strict=True)]


def formula(q, own, guide, weight):
    """Every key's share by definition, in float64."""
    q, k, v = (x.double().unflatten(-1, (HEADS, -1)) for x in (q, *joined(own, guide)))
    share = torch.einsum("nqhd,nkhd->nhqk", q, k / DIM**0.5).exp()
    share[..., -guide[0].shape[1] :] *= weight
    return torch.einsum("nhqk,nkhd->nqhd", share / share.sum(-1, keepdim=True), v).flatten(2)


@pytest.mark.parametrize("times", [1, 2, 7])
def test_a_weight_is_the_keys_repeated(way, times):
    q, own, guide = tensors(3, 10, 20, 5)
    more, pytorch = joined(own, guide, times), models.attention_function("pytorch")
    expected = models.fused_on_cpu(pytorch, q, *more, HEADS)
    ours = weighted_attention(q, own, guide, HEADS, times)
    assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("weight", WEIGHTS)
@settings(deadline=None, max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 70), st.integers(1, 30)),
    seed=st.integers(0, 10**6),
)
def test_a_weight_follows_its_formula(weight, shape, seed):
    given_tensors = tensors(*shape, seed=seed)
    ours = weighted_attention(*given_tensors, HEADS, weight)
    assert torch.allclose(ours.double(), formula(*given_tensors, weight), atol=1e-5)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_half_precision_costs_no_more_than_without_a_weight(way, weight):
    """A relative mean error: two results that are rounded and mixed, instead of one rounded."""
    q, own, guide = tensors(4, 64, 200, 30, torch.bfloat16, device=management.compute_device())
    ours = weighted_attention(q, own, guide, HEADS, weight)
    plain = models.attention_function("pytorch")(q, *joined(own, guide), HEADS)

    def error(given, expected):
        return float((given.double() - expected).abs().mean() / expected.abs().mean())

    assert ours.dtype == torch.bfloat16
    usual = error(plain, formula(q, own, guide, 1))
    assert error(ours, formula(q, own, guide, weight)) < 2 * usual


def test_a_rounded_bias_still_differs_by_the_weights_logarithm(monkeypatch):
    biases = []
    monkeypatch.setattr(weighted, "_attention_with_sums", lambda q, k, v: None)
    monkeypatch.setattr(models, "biased_attention", lambda *args: biases.append(args[-1]))
    for weight in (0.3, 3.0, 42.0, 100.0):
        weighted_attention(*tensors(1, 2, 3, 4, torch.bfloat16), HEADS, weight)
        own, of_guide = biases[-1].flatten()[[0, -1]].double()
        assert of_guide - own == pytest.approx(math.log(weight), abs=1e-4)
        assert biases[-1].shape == (1, 1, 1, 7), "one bias for each key, none for each pair"
        assert (biases[-1].flatten()[:3] == own).all()
        assert (biases[-1].flatten()[3:] == of_guide).all()


def test_more_windows_than_a_kernel_takes_are_split(way, monkeypatch):
    given_tensors = tensors(5, 6, 7, 3)
    whole = weighted_attention(*given_tensors, HEADS, 8.0)
    monkeypatch.setattr(weighted, "MOST_WINDOWS", 2)
    assert torch.allclose(weighted_attention(*given_tensors, HEADS, 8.0), whole, atol=1e-6)


@pytest.mark.parametrize("learned", [slice(0, 5), slice(3, 5), slice(0, 1)])
def test_the_gradient_is_that_of_the_keys_repeated(learned):
    """Also where only the guide's keys and values have one, as in a first block."""
    results = []
    for times in (1, 3):
        q, own, guide = tensors(2, 8, 9, 4)
        leaves = [each.requires_grad_() for each in (q, *own, *guide)[learned]]
        more = tuple(torch.cat([each] * times, 1) for each in guide)
        out = weighted_attention(q, own, more, HEADS, 3 / times)
        results.append(torch.autograd.grad(out.square().sum(), leaves))
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours, expected, atol=1e-5)
