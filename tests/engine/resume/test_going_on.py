"""A render that was stopped goes on bit by bit, for any sampler; what changed is never answered."""

from itertools import pairwise

import comfy.sample
import comfy.samplers
import pytest
import torch
from atlasvid.engine.branch.apply import apply_detail_branch
from atlasvid.engine.geometry.grid import Grid
from atlasvid.engine.proxy.frequencies import apply_rope_method
from atlasvid.engine.proxy.structure import apply_structure_guidance
from atlasvid.engine.resume import store
from atlasvid.engine.resume.run import apply_resume
from sampling import SHAPE, Stopped, calls, conditioning, sample
from wan import plan_of, rand, small_wan

PLAN = plan_of((3, 8, 8), (2, 4, 4), stride=2)
SAMPLERS = ("euler", "dpmpp_2m", "uni_pc", "euler_ancestral", "res_multistep", "heun", "lcm")


def detail(model, **changes):
    """The detail branch and structure guidance around a model."""
    given = {"guide_weight": 4.0, "window": Grid(2, 2, 2), "guide_noise": "matched", **changes}
    strength = given.pop("strength", 0.8)
    proxy = given.pop("proxy", rand(1, 16, 2, 4, 4, seed=3))
    branch = apply_detail_branch(model, PLAN, proxy, **given)
    return apply_structure_guidance(branch, PLAN, proxy, strength=strength, end_percent=0.7)


def stop_and_go_on(run, after):
    """What comes out after a stop before forward number `after`, and the forwards of both parts."""
    with calls(stop_before=after) as first, pytest.raises(Stopped):
        run()
    with calls() as second:
        return run(), len(first), len(second)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_stop_before_any_forward_changes_no_bit(wan, sampler, cfg):
    model, chosen = apply_resume(wan), {"sampler": sampler, "cfg": cfg}
    with calls() as plain:
        expected = sample(wan, **chosen)
    assert len(plain) >= 4
    for after in range(1, len(plain)):
        result, first, second = stop_and_go_on(lambda: sample(model, **chosen), after)
        assert torch.equal(result, expected)
        assert first == after
        assert second == len(plain) - after, "a kept answer was computed again"
        if after + 1 < len(plain):
            for render in store.renders():
                render.delete()
    with calls() as none:
        assert torch.equal(sample(model, **chosen), expected)
    assert not none


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("guide_noise", ["matched", "clean"])
def test_the_detail_branch_with_structure_guidance_goes_on(wan, guide_noise, cfg):
    """In any order of the nodes: the answers hold what structure guidance made of them."""
    chosen = {"sampler": "dpmpp_2m", "cfg": cfg, "latent": rand(1, 16, 3, 8, 8, seed=5)}
    expected = sample(detail(wan, guide_noise=guide_noise), **chosen)
    unguided = sample(detail(wan, guide_noise=guide_noise, strength=0.0), **chosen)
    assert not torch.equal(expected, unguided)
    for model in (
        apply_resume(detail(wan, guide_noise=guide_noise)),
        detail(apply_resume(wan), guide_noise=guide_noise),
    ):
        result, *_ = stop_and_go_on(lambda model=model: sample(model, **chosen), 2)
        assert torch.equal(result, expected)
        with calls() as none:
            sample(model, **chosen)
        assert not none
        for render in store.renders():
            render.delete()


@pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
def test_two_models_in_a_row_go_on(wan, after):
    """As Wan 2.2's experts: one samples the high noise, the other goes on from its latent."""
    low = small_wan(seed=1, num_layers=2, ffn_dim=256)

    def both(first, second):
        steps = {"steps": 6, "sampler": "dpmpp_2m", "cfg": 1.0}
        high = {"start_step": 0, "last_step": 3, "force_full_denoise": False}
        half = sample(first, **steps, **high)
        return sample(second, **steps, latent=half, start_step=3, last_step=6, disable_noise=True)

    expected = both(wan, low)
    kept = apply_resume(wan), apply_resume(low)
    result, first, second = stop_and_go_on(lambda: both(*kept), after)
    assert torch.equal(result, expected)
    assert (first, second) == (after, 6 - after)


def test_a_proxy_with_scaled_positions_and_batch_two_goes_on(wan):
    proxy = apply_rope_method(wan, "yarn", temporal_scale=4.0, spatial_scale=1.0, plan=None)
    chosen = {"latent": torch.zeros(2, 16, 1, 6, 10), "sampler": "res_multistep", "cfg": 3.0}
    expected = sample(proxy, **chosen)
    result, *_ = stop_and_go_on(lambda: sample(apply_resume(proxy), **chosen), 2)
    assert torch.equal(result, expected)


def test_without_the_node_nothing_is_written_and_no_bit_differs(wan, output):
    expected = sample(wan)
    assert not output.exists()
    assert torch.equal(sample(apply_resume(wan)), expected)
    assert len(list(output.rglob("*.safetensors"))) == 4 + 1
    assert torch.equal(sample(wan), expected)


def test_a_sampler_that_works_on_the_answer_itself_does_not_change_what_is_kept(wan):
    def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for level, following in pairwise(sigmas):
            denoised = model(x, level * x.new_ones(1), **extra_args)
            denoised.mul_(0.9)
            x = denoised + (x - denoised) * following / level
        return x

    def run(model):
        noise = comfy.sample.prepare_noise(torch.zeros(SHAPE), 7)
        with torch.inference_mode():
            return comfy.sample.sample_custom(
                model,
                noise,
                1.0,
                comfy.samplers.KSAMPLER(sampler),
                torch.tensor([1.0, 0.7, 0.3, 0.0]),
                conditioning(1),
                conditioning(2),
                torch.zeros(SHAPE),
                disable_pbar=True,
                seed=7,
            )

    expected, model = run(wan), apply_resume(wan)
    result, first, second = stop_and_go_on(lambda: run(model), 2)
    assert torch.equal(result, expected)
    assert (first, second) == (2, 1)
    assert torch.equal(run(model), expected)
