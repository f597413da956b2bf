import numpy as np
import pytest
import scipy.fft
import torch
from atlasvid.engine.geometry.grid import Grid
from atlasvid.engine.proxy.latents import upscale_proxy
from atlasvid.engine.proxy.structure import LowPass, apply_structure_guidance, guidance_weight
from wan import plan_of, rand, small_wan

PLAN = plan_of((5, 16, 24), (2, 8, 12))


@pytest.fixture(scope="module")
def wan():
    return small_wan()


def passed(x, kept=(2, 8, 12)):
    """What the low-pass lets through of [B, C, T, H, W], by scipy's cosine transform."""
    modes = scipy.fft.dctn(x.double().numpy(), axes=(2, 3, 4), norm="ortho")
    for axis, count in enumerate(kept, 2):
        share = np.zeros(modes.shape[axis])
        share[:count] = np.cos(np.pi * np.arange(count) / count / 2) ** 2
        modes *= share.reshape([-1 if each == axis else 1 for each in range(5)])
    return torch.from_numpy(scipy.fft.idctn(modes, axes=(2, 3, 4), norm="ortho"))


def run(model, denoised, sigma):
    for function in model.model_options.get("sampler_post_cfg_function", []):
        denoised = function({"denoised": denoised, "sigma": torch.tensor([sigma])})
    return denoised


@pytest.mark.parametrize(
    ("fine", "coarse"), [((5, 16, 24), (2, 8, 12)), ((1, 9, 7), (1, 3, 5)), ((3, 4, 4), (3, 4, 4))]
)
def test_low_pass_falls_smoothly_to_the_proxys_nyquist_frequency(fine, coarse):
    low_pass, x = LowPass(Grid(*fine), Grid(*coarse)), rand(2, 3, *fine).double()
    low = low_pass.synthesise(low_pass.analyse(x))
    assert torch.allclose(low, passed(x, coarse), atol=1e-10)
    assert torch.allclose(low.mean((2, 3, 4)), x.mean((2, 3, 4)), atol=1e-10)


def guide(wan, proxy, strength=1.0):
    return apply_structure_guidance(wan, PLAN, proxy, strength=strength, end_percent=0.6)


def test_what_passes_becomes_the_proxys_and_the_rest_stays(wan):
    proxy, denoised = rand(1, 16, 2, 8, 12, seed=1), rand(1, 16, 5, 16, 24, seed=2)
    guided = run(guide(wan, proxy), denoised, 1.0)
    wanted = upscale_proxy(wan.model.latent_format.process_in(proxy), PLAN)
    assert torch.allclose(guided.double(), denoised + passed(wanted - denoised), atol=1e-5)
    assert not torch.allclose(guided, denoised, atol=1e-2)


def test_half_strength_goes_half_way(wan):
    proxy, denoised = rand(1, 16, 2, 8, 12, seed=1), rand(1, 16, 5, 16, 24, seed=2)
    full = run(guide(wan, proxy), denoised, 1.0)
    half = run(guide(wan, proxy, strength=0.5), denoised, 1.0)
    assert torch.allclose(half, (full + denoised) / 2, atol=1e-5)


def test_strength_zero_and_late_steps_change_nothing(wan):
    proxy, denoised = rand(1, 16, 2, 8, 12, seed=1), rand(1, 16, 5, 16, 24, seed=2)
    assert torch.equal(run(guide(wan, proxy, strength=0.0), denoised, 1.0), denoised)
    guided = guide(wan, proxy)
    end = wan.get_model_object("model_sampling").percent_to_sigma(0.6)
    assert torch.equal(run(guided, denoised, float(end)), denoised)
    assert torch.equal(run(guided, denoised, 0.1), denoised)
    assert not torch.equal(run(guided, denoised, float(end) + 0.05), denoised)


def test_weight_falls_as_a_cosine():
    weights = [guidance_weight(s, 0.5) for s in (1.0, 0.75, 0.5, 0.2)]
    assert weights == pytest.approx([1.0, 0.5, 0.0, 0.0])


def test_another_latent_size_is_refused(wan):
    guided = guide(wan, rand(1, 16, 2, 8, 12))
    with pytest.raises(ValueError, match="planned for a latent of 5 x 16 x 24"):
        run(guided, rand(1, 16, 5, 16, 16), 1.0)
