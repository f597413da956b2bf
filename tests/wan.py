"""Small Wans and direct forwards, for tests."""

import torch
from atlasvid.engine.comfyui import management, models
from atlasvid.engine.families import tiny
from atlasvid.engine.geometry import space
from atlasvid.engine.geometry.plan import Plan

WAN21 = space.LatentSpace(channels=16, spatial=8, temporal=4, patch=(1, 2, 2))


def plan_of(latent, proxy_latent, stride=4, space=WAN21, fps=16.0):
    """A plan with exactly these latent sizes (frames, height, width)."""
    f, h, w = latent
    fg, hg, wg = proxy_latent
    scale = space.spatial
    return Plan(
        width=w * scale,
        height=h * scale,
        frames=4 * (f - 1) + 1,
        fps=fps,
        temporal_stride=stride,
        proxy_width=wg * scale,
        proxy_height=hg * scale,
        proxy_frames=4 * (fg - 1) + 1,
        space=space,
    )


def forward(patcher, x, t, context, **kwargs):
    """The model's forward as the sampler calls it: with the patcher's options and wrappers.

    Computed where ComfyUI computes; the model and the result are on the CPU afterwards.
    """
    device = management.compute_device()
    x, t, context = x.to(device), t.to(device), context.to(device)
    kwargs = {name: value.to(device) for name, value in kwargs.items()}
    options = {**patcher.model_options["transformer_options"], "wrappers": patcher.wrappers}
    patches = {name: patcher.get_model_object(name) for name in patcher.object_patches}
    model = patcher.model
    kept = {name: model.get_submodule(name) for name in patches}
    try:
        for name, value in patches.items():
            _set(model, name, value)
        model.diffusion_model.to(device)
        with torch.no_grad():
            out = model.diffusion_model(x, t, context, transformer_options=options, **kwargs)
        return out.cpu()
    finally:
        model.diffusion_model.to("cpu")
        for name, value in kept.items():
            _set(model, name, value)


def _set(model, name, value):
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)


def small_wan(seed=0, **config):
    """A stock ModelPatcher with a random two-block Wan."""
    config = {"num_layers": 3, "dim": 256, "ffn_dim": 512} | config
    return models.load_diffusion_model(tiny.wan_state(seed, **config))


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())
