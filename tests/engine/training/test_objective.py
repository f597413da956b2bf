"""The objective against the stock sampler's own parametrisation."""

import pytest
import torch
from atlasvid.engine.training.objective import (
    NoiseLevels,
    flow_loss,
    noised,
    sample_order,
    step_generator,
)
from wan import rand, small_wan


@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
def test_the_shift_is_the_stock_samplings(shift):
    sampling = small_wan().get_model_object("model_sampling")
    sampling.set_parameters(shift=shift, multiplier=1000)
    for u in (0.001, 0.25, 0.5, 0.999):
        stock = float(sampling.sigma(torch.tensor(u * 1000)))
        assert NoiseLevels(shift).sigma(u) == pytest.approx(stock, abs=1e-6)


def test_a_range_keeps_the_shifts_distribution():
    """Drawing in a range is drawing from all and keeping what lies in it."""
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0)).tolist()
    every = torch.tensor([NoiseLevels(5.0).sigma(x) for x in u])
    kept = every[(every >= 0.6) & (every <= 0.9)]
    drawn = torch.tensor([NoiseLevels(5.0, 0.6, 0.9).sigma(x) for x in u])
    assert drawn.min() >= 0.6
    assert drawn.max() <= 0.9
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    assert torch.allclose(drawn.quantile(quantiles), kept.quantile(quantiles), atol=0.005)


def test_the_velocity_is_what_the_stock_sampler_takes_from_the_model():
    """x - sigma * velocity is the clean latent, as the stock denoised is computed."""
    sampling = small_wan().get_model_object("model_sampling")
    latent = rand(1, 16, 2, 4, 4)
    x, velocity = noised(latent, 0.7, step_generator(0, 1))
    sigma = torch.tensor(0.7)
    assert torch.allclose(sampling.calculate_denoised(sigma, velocity, x), latent, atol=1e-6)
    noise = velocity + latent
    stock = sampling.noise_scaling(sigma, noise, latent)
    assert torch.allclose(stock, x, atol=1e-6)
    assert noise.std() == pytest.approx(1, abs=0.1)


def test_the_loss_is_in_float32():
    a, b = rand(4, 4), rand(4, 4, seed=1)
    assert flow_loss(a.bfloat16(), b).dtype == torch.float32
    assert float(flow_loss(a, b)) == pytest.approx(float(((a - b) ** 2).mean()))


def test_random_numbers_depend_on_their_place_alone():
    def draw(*place):
        return torch.rand(3, generator=step_generator(*place)).tolist()

    assert draw(1, 5, 0) == draw(1, 5, 0)
    assert len({tuple(draw(*p)) for p in ((1, 5, 0), (2, 5, 0), (1, 6, 0), (1, 5, 1))}) == 4


def test_an_epoch_visits_every_sample_once():
    orders = [sample_order(7, 3, epoch) for epoch in range(4)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert orders[0] != orders[1]
    assert orders[0] == sample_order(7, 3, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [((0.0,), "shift is 0"), ((5.0, 0.9, 0.5), "smaller first"), ((5.0, -0.1, 1.0), "0 to 1")],
)
def test_impossible_noise_levels_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        NoiseLevels(*given)
