import math

import pytest
import torch
from atlasvid.engine.proxy.frequencies import (
    ScaledRope,
    apply_rope_method,
    ntk_frequencies,
    riflex_frequencies,
    rope_frequencies,
    yarn_frequencies,
    yarn_temperature,
)
from wan import forward, plan_of, rand, relative_error, small_wan


@pytest.fixture(scope="module")
def wan():
    return small_wan()


def sample(model):
    return forward(model, rand(1, 16, 5, 8, 8), torch.tensor([500.0]), rand(1, 16, 4096, seed=2))


def stock_scaled(wan, time, space=1.0):
    from comfy_extras.nodes_rope import ScaleROPE

    return ScaleROPE.execute(wan, space, 0.0, space, 0.0, time, 0.0).args[0]


def test_linear_is_the_stock_node(wan):
    ours = apply_rope_method(wan, "linear", temporal_scale=4.0, spatial_scale=0.5, plan=None)
    assert torch.equal(sample(ours), sample(stock_scaled(wan, 4.0, 0.5)))
    assert relative_error(sample(ours), sample(wan)) > 1e-3


def test_the_plans_stride_is_the_scale(wan):
    plan = plan_of((7, 16, 16), (3, 8, 8), stride=3)
    ours = apply_rope_method(wan, "linear", temporal_scale=4.0, spatial_scale=1.0, plan=plan)
    assert torch.equal(sample(ours), sample(stock_scaled(wan, 3.0)))


@pytest.mark.parametrize("method", ["ntk", "yarn"])
def test_scale_one_changes_nothing(wan, method):
    same = apply_rope_method(wan, method, temporal_scale=1.0, spatial_scale=1.0, plan=None)
    assert relative_error(sample(same), sample(wan)) < 1e-5
    scaled = apply_rope_method(wan, method, temporal_scale=4.0, spatial_scale=1.0, plan=None)
    assert relative_error(sample(scaled), sample(wan)) > 1e-3


def test_embedder_is_a_drop_in(wan):
    stock = wan.model.diffusion_model.rope_embedder
    ours = ScaledRope([rope_frequencies(d) for d in stock.axes_dim])
    ids = rand(2, 7, 3) * 50
    assert ours(ids).shape == stock(ids).shape
    assert torch.allclose(ours(ids), stock(ids), atol=1e-5)


def test_ntk_formula():
    """theta' = theta * s^(d / (d - 2)): the slowest frequency is divided by s, the fastest kept."""
    s, d = 8.0, 44
    expected = [(10000 * s ** (d / (d - 2))) ** (-2 * j / d) for j in range(d // 2)]
    ours = ntk_frequencies(d, 1 / s)
    assert torch.allclose(ours, torch.tensor(expected, dtype=torch.float64))
    stock = rope_frequencies(d)
    assert float(stock[-1] / ours[-1]) == pytest.approx(s)
    assert float(ours[0]) == 1.0


def test_yarn_formula():
    """h(theta) = (1 - gamma(r)) theta / s + gamma(r) theta, gamma a ramp from 1 to 32 turns."""
    s, d, length = 4.0, 42, 2000
    for j, ours in enumerate(yarn_frequencies(d, 1 / s, length)):
        theta = 10000 ** (-2 * j / d)
        turns = length / (2 * math.pi / theta)
        gamma = min(max((turns - 1) / 31, 0), 1)
        assert float(ours) == pytest.approx((1 - gamma) * theta / s + gamma * theta)
    assert yarn_temperature(1 / s) == pytest.approx(0.1 * math.log(s) + 1)
    assert yarn_temperature(1.0) == yarn_temperature(4.0) == 1.0


def test_riflex_formula():
    """freqs[k - 1] = 0.9 * 2 pi / L, every other frequency as it was."""
    ours, stock = riflex_frequencies(44, 81), rope_frequencies(44)
    assert float(ours[5]) == pytest.approx(0.9 * 2 * math.pi / 81)
    keep = torch.arange(22) != 5
    assert torch.equal(ours[keep], stock[keep])
    assert torch.equal(riflex_frequencies(44, 21), stock), "a short clip needs no change"


def test_riflex_covers_the_plan(wan):
    plan = plan_of((41, 16, 16), (11, 8, 8), stride=4)
    ours = apply_rope_method(wan, "riflex", temporal_scale=1.0, spatial_scale=1.0, plan=plan)
    rope = ours.get_model_object("diffusion_model.rope_embedder")
    assert float(rope.frequencies[0][5]) == pytest.approx(
        min(10000 ** (-10 / 44), 0.9 * 2 * math.pi / 41)
    )
    assert ours.model_options["transformer_options"]["rope_options"]["scale_t"] == 4.0


def test_the_model_itself_is_untouched(wan):
    before = sample(wan)
    for method in ("linear", "ntk", "yarn", "riflex"):
        sample(apply_rope_method(wan, method, temporal_scale=4.0, spatial_scale=0.5, plan=None))
    assert torch.equal(before, sample(wan))


@pytest.mark.parametrize(
    ("method", "time", "space", "message"),
    [
        ("cubic", 4.0, 1.0, "'cubic'; allowed are linear, ntk, yarn, riflex"),
        ("linear", 0.0, 1.0, "temporal_scale is 0.0"),
        ("ntk", 4.0, -1.0, "spatial_scale is -1.0"),
    ],
)
def test_wrong_values_are_refused(wan, method, time, space, message):
    with pytest.raises(ValueError, match=message):
        apply_rope_method(wan, method, temporal_scale=time, spatial_scale=space, plan=None)
