"""A guide that is denoised beside the target, against the dense reference stepped by hand."""

from itertools import pairwise

import comfy.sample
import comfy.samplers
import pytest
import torch
from atlasvid.engine.branch.apply import apply_detail_branch
from atlasvid.engine.branch.joint import COND, UNCOND, JointGuide
from atlasvid.engine.geometry.grid import Grid
from dense_reference import dense_forward
from wan import plan_of, rand, relative_error, small_wan

LATENT, PROXY, WINDOW, STRIDE = (5, 7, 10), (2, 3, 6), (2, 2, 3), 4
PLAN = plan_of(LATENT, PROXY, STRIDE)
SEED, STEPS = 11, 3


@pytest.fixture(scope="module")
def wan():
    return small_wan(num_layers=2)


def sampled(model, sampler, cfg, denoise, batch, texts):
    latent = rand(batch, 16, *LATENT, seed=5)
    noise = comfy.sample.prepare_noise(latent, SEED)
    conditionings = [[[text, {}]] for text in texts]
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, STEPS, cfg, sampler, "simple", *conditionings, latent,
            denoise=denoise, seed=SEED, disable_pbar=True,
        )  # fmt: skip


def by_hand(wan, proxy, cfg, denoise, batch, texts):
    """Euler's method on the pair of target and guide, both with guidance."""
    sampler = comfy.samplers.KSampler(wan, STEPS, torch.device("cpu"), "euler", "simple", denoise)
    space, net = wan.model.latent_format, wan.model.diffusion_model
    clean = space.process_in(rand(batch, 16, *LATENT, seed=5))
    p = space.process_in(proxy).expand(batch, -1, -1, -1, -1)
    sigmas = sampler.sigmas
    noise = comfy.sample.prepare_noise(clean, SEED)
    guide_noise = comfy.sample.prepare_noise(proxy, SEED).expand_as(p)
    x = (1 - sigmas[0]) * clean + sigmas[0] * noise
    g = (1 - sigmas[0]) * p + sigmas[0] * guide_noise
    for now, after in pairwise(sigmas):
        t = (1000 * now).expand(batch)
        found = [
            dense_forward(
                net, x, t, text.expand(batch, -1, -1), WINDOW, g, t, STRIDE, with_guide=True
            )
            for text in texts
        ]
        v, gv = (b + cfg * (a - b) for a, b in zip(*found, strict=True))
        x, g = x + (after - now) * v, g + (after - now) * gv
    return space.process_out(x)


@pytest.mark.parametrize(("cfg", "denoise", "batch"), [(3.0, 1.0, 1), (1.0, 0.6, 1), (2.0, 0.7, 2)])
def test_joint_sampling_is_that_of_the_pair(wan, cfg, denoise, batch):
    texts, proxy = [rand(1, 6, 4096, seed=seed) for seed in (2, 3)], rand(1, 16, *PROXY, seed=4)
    patched = apply_detail_branch(wan, PLAN, proxy, Grid(*WINDOW), "joint")
    ours = sampled(patched, "euler", cfg, denoise, batch, texts)
    with torch.no_grad():
        expected = by_hand(wan, proxy, cfg, denoise, batch, texts)
    assert relative_error(ours, expected) < 1e-4
    matched = apply_detail_branch(wan, PLAN, proxy, Grid(*WINDOW), "matched")
    other = sampled(matched, "euler", cfg, denoise, batch, texts)
    assert relative_error(other, expected) > 1e-3, "the guide's own steps must matter"


def test_from_noise_the_finished_proxy_does_not_matter(wan):
    """At sigma 1 there is nothing of it: target and guide are both made from noise."""
    texts = [rand(1, 6, 4096, seed=seed) for seed in (2, 3)]
    made = [
        sampled(
            apply_detail_branch(wan, PLAN, rand(1, 16, *PROXY, seed=s), Grid(*WINDOW), "joint"),
            "euler", 2.0, 1.0, 1, texts,
        )
        for s in (4, 5)
    ]  # fmt: skip
    assert relative_error(*made) < 1e-5


def test_a_level_that_is_evaluated_again_finds_the_guide_where_it_was():
    """As Heun's method does, and as conditionings that are evaluated one by one do."""
    level = [torch.full((1, 1, 1, 1, 1), sigma) for sigma in (1.0, 0.5)]
    start, v, u = (rand(1, 16, *PROXY, seed=seed) for seed in range(3))
    guide = JointGuide(start, level[0], cfg=3.0)
    assert torch.equal(guide.at(level[0]), start)
    guide.record(v, [COND])
    assert torch.equal(guide.at(level[0]), start)
    guide.record(u, [UNCOND])
    moved = guide.at(level[1])
    torch.testing.assert_close(moved, start - 0.5 * (u + 3 * (v - u)))
    assert torch.equal(guide.at(level[1]), moved)
    guide.record(torch.cat([u, v]), [UNCOND, COND])
    torch.testing.assert_close(guide.at(level[0]), moved + 0.5 * (u + 3 * (v - u)))
