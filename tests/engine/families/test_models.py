"""Small twins of every supported Wan, loaded by the stock loaders and sampled."""

import comfy.hooks
import comfy.model_base
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import pytest
import torch
from atlasvid.engine.branch.apply import apply_detail_branch
from atlasvid.engine.branch.run import SamplingRun
from atlasvid.engine.comfyui import models
from atlasvid.engine.families import tiny
from atlasvid.engine.families.family import latent_space
from atlasvid.engine.geometry.grid import Grid
from wan import forward, plan_of, rand, relative_error, small_wan

SMALL = {"num_layers": 2, "dim": 256, "ffn_dim": 512}
WHOLE = Grid(99, 99, 99)
LATENT, PROXY = (5, 12, 12), (2, 6, 6)


def sample(model, latent, extra=None, mask=None, **steps):
    noise = comfy.sample.prepare_noise(latent, 3)
    if steps.get("disable_noise"):  # what KSampler (Advanced) does
        noise = torch.zeros_like(latent)
    conds = [[[rand(1, 16, 4096, seed=s), dict(extra or {})]] for s in (1, 2)]
    with torch.no_grad():
        return comfy.sample.sample(
            model,
            noise,
            4,
            5.0,
            "euler",
            "simple",
            *conds,
            latent,
            noise_mask=mask,
            seed=3,
            disable_pbar=True,
            **steps,
        )


def random_lora(model):
    """A LoRA of rank 4 on some layers of every block."""
    lora = {}
    for i in range(2):
        for layer in ("self_attn.q", "self_attn.o", "cross_attn.v", "ffn.0"):
            name = f"diffusion_model.blocks.{i}.{layer}"
            outputs, inputs = model.model.get_submodule(name).weight.shape
            lora[f"{name}.lora_A.weight"] = rand(4, inputs, seed=i)
            lora[f"{name}.lora_B.weight"] = rand(outputs, 4, seed=i + 1) / 10
    return lora


def merged(lora):
    """The weights of the small Wan with a LoRA added."""
    state = tiny.wan_state(**SMALL)
    for name in lora:
        if name.endswith("lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            weight = layer.removeprefix("diffusion_model.") + ".weight"
            state[weight] += lora[layer + ".lora_B.weight"] @ lora[name]
    return state


def equal_to_stock(model, channels=16, **kwargs):
    """With one window and no guide, the branch is the stock forward of this very model."""
    plan = plan_of(LATENT, PROXY, space=latent_space(model))
    x, t = rand(1, channels, *LATENT, seed=1), torch.tensor([600.0])
    context = rand(1, 16, 4096, seed=2)
    ours = forward(apply_detail_branch(model, plan, None, WHOLE, "clean"), x, t, context, **kwargs)
    return relative_error(ours, forward(model, x, t, context, **kwargs)) < 1e-5


def branch(model, guide_noise="clean"):
    space = latent_space(model)
    plan = plan_of(LATENT, PROXY, space=space)
    proxy = rand(1, space.channels, *PROXY, seed=4)
    return apply_detail_branch(model, plan, proxy, Grid(2, 3, 3), guide_noise)


@pytest.mark.parametrize("guide_noise", ["clean", "matched"])
@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"model_type": "i2v", "in_dim": 36}, id="2.1 I2V"),
        pytest.param({"in_dim": 36}, id="2.2 A14B I2V"),
    ],
)
def test_image_to_video(config, guide_noise):
    model = small_wan(**SMALL, **config)
    assert type(model.model) is comfy.model_base.WAN21
    latent = torch.zeros(1, 16, *LATENT)
    mask = torch.ones(1, 1, *LATENT)
    mask[:, :, 0] = 0
    image = {"concat_latent_image": rand(1, 16, *LATENT, seed=9), "concat_mask": mask}
    out = sample(branch(model, guide_noise), latent, image)
    assert out.isfinite().all()
    other = {**image, "concat_latent_image": rand(1, 16, *LATENT, seed=10)}
    assert relative_error(sample(branch(model, guide_noise), latent, other), out) > 1e-3
    extra = {"clip_fea": rand(1, 257, 1280)} if "model_type" in config else {}
    assert equal_to_stock(model, channels=36, **extra)


def euler(models):
    """Euler's method written out, one model per step, with guidance 5 and the sampler's noise."""
    model = models[0]
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", len(models))
    x = sigmas[0] * comfy.sample.prepare_noise(torch.zeros(1, 16, *LATENT), 3)
    for each, now, after in zip(models, sigmas, sigmas[1:], strict=False):
        patched = each.clone()
        patched.model_options["transformer_options"]["atlasvid"] = SamplingRun(3, keep_guide=False)
        positive, negative = (
            forward(patched, x, 1000 * now[None], rand(1, 16, 4096, seed=seed)) for seed in (1, 2)
        )
        x = x + (after - now) * (negative + 5 * (positive - negative))
    return model.model.process_latent_out(x)


@pytest.mark.parametrize("guide_noise", ["clean", "matched"])
def test_two_experts_in_a_row(guide_noise):
    """Wan 2.2 A14B: one model for high noise, another for low, as two KSampler (Advanced)."""
    high, low = (branch(small_wan(seed, **SMALL), guide_noise) for seed in (0, 1))
    latent = torch.zeros(1, 16, *LATENT)
    noisy = sample(high, latent, start_step=0, last_step=2)
    out = sample(low, noisy, start_step=2, last_step=4, disable_noise=True, force_full_denoise=True)
    assert relative_error(out, euler([high, high, low, low])) < 1e-4
    assert relative_error(out, euler([high] * 4)) > 1e-2


@pytest.mark.parametrize("guide_noise", ["clean", "matched"])
def test_weights_scheduled_by_hooks(guide_noise):
    """A LoRA that a hook takes away in the middle: the clean guide must follow it."""
    model = small_wan(**SMALL)
    lora = random_lora(model)
    adapted = models.load_diffusion_model(merged(lora))
    expected = euler([branch(m, guide_noise) for m in (adapted, adapted, model, model)])
    hooks = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    keyframes.add(comfy.hooks.HookKeyframe(1.0, 0.0))
    keyframes.add(comfy.hooks.HookKeyframe(0.0, 0.45))
    hooks.set_keyframes_on_hooks(keyframes)
    latent = torch.zeros(1, 16, *LATENT)
    out = sample(branch(model, guide_noise), latent, {"hooks": hooks})
    assert relative_error(out, expected) < 1e-4


@pytest.mark.parametrize("guide_noise", ["clean", "matched"])
def test_ti2v_5b(guide_noise):
    """Wan 2.2 TI2V-5B: 48 channels at 1/16 size, and per-frame timesteps with a start image."""
    model = small_wan(**SMALL, in_dim=48, out_dim=48)
    assert type(model.model) is comfy.model_base.WAN22
    space = latent_space(model)
    assert (space.channels, space.spatial) == (48, 16)
    assert equal_to_stock(model, channels=48)
    latent = rand(1, 48, *LATENT, seed=5)
    text_only = sample(branch(model, guide_noise), torch.zeros_like(latent))
    assert text_only.isfinite().all()
    mask = torch.ones(1, 1, *LATENT)
    mask[:, :, 0] = 0
    started = sample(branch(model, guide_noise), latent, mask=mask)
    assert torch.allclose(started[:, :, 0], latent[:, :, 0], atol=1e-4), "the start image stays"
    assert relative_error(started, text_only) > 1e-3


def test_fp8_scaled_weights():
    state = tiny.wan_state(**SMALL)
    exact = dict(state)
    for name in [n for n in state if n.startswith("blocks.") and n.endswith(".weight")]:
        if state[name].ndim == 2:
            scale = state[name].abs().max() / 448
            state[name] = (state[name] / scale).to(torch.float8_e4m3fn)
            state[name.replace(".weight", ".scale_weight")] = scale.clone()
            exact[name] = state[name].float() * scale
    state["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    model = models.load_diffusion_model(state)
    assert equal_to_stock(model)
    same = models.load_diffusion_model(exact)
    latent = torch.zeros(1, 16, *LATENT)
    assert relative_error(sample(branch(model), latent), sample(branch(same), latent)) < 1e-3


def test_weights_that_are_made_when_a_layer_is_called():
    """GGUF's way in: custom operations whose layers hold packed weights and unpack per call."""

    class Packed(comfy.ops.manual_cast):
        class Linear(torch.nn.Module):
            def __init__(self, inputs, outputs, bias=True, device=None, dtype=None):
                super().__init__()
                self.shape = (outputs, inputs)

            def _load_from_state_dict(self, state, prefix, *args):
                value = state[prefix + "weight"].float()
                self.scale = value.abs().amax(1, keepdim=True) / 127
                self.packed = (value / self.scale).round().to(torch.int8)
                self.bias = state[prefix + "bias"]

            def forward(self, x):
                return torch.nn.functional.linear(x, self.packed * self.scale, self.bias)

    model = comfy.sd.load_diffusion_model_state_dict(
        tiny.wan_state(**SMALL), model_options={"custom_operations": Packed}
    )
    assert not hasattr(model.model.diffusion_model.blocks[0].self_attn.q, "weight")
    assert equal_to_stock(model)
    assert sample(branch(model), torch.zeros(1, 16, *LATENT)).isfinite().all()


def test_stock_lora():
    model = small_wan(**SMALL)
    lora = random_lora(model)
    adapted, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    latent = torch.zeros(1, 16, *LATENT)
    plain = sample(branch(model), latent)
    with_lora = sample(branch(adapted), latent)
    assert relative_error(with_lora, plain) > 1e-3
    same = models.load_diffusion_model(merged(lora))
    assert relative_error(sample(branch(same), latent), with_lora) < 1e-3
    assert torch.equal(sample(branch(model), latent), plain)


def test_batches_with_a_proxy_each():
    """Two videos at once are the two videos one by one."""
    model = small_wan(**SMALL)
    plan = plan_of(LATENT, PROXY)
    proxies = rand(2, 16, *PROXY, seed=4)
    x, context = rand(2, 16, *LATENT, seed=1), rand(1, 16, 4096, seed=2)
    t = torch.tensor([600.0, 600.0])

    def run(proxy, x, t):
        patched = apply_detail_branch(model, plan, proxy, Grid(2, 3, 3), "clean")
        return forward(patched, x, t, context.expand(len(x), -1, -1))

    both = run(proxies, x, t)
    for i in range(2):
        one = run(proxies[i : i + 1], x[i : i + 1], t[:1])
        assert relative_error(both[i : i + 1], one) < 1e-5
    with pytest.raises(ValueError, match="2 videos, the target 3"):
        run(proxies, x[[0, 1, 0]], t[[0, 1, 0]])
