"""The detail branch in bfloat16, as users run it, against the dense reference in float32.

On a card (`tools/test.py --card`) the kernels are those that users get: flash or cuDNN attention,
fused rotations and activations.
"""

import pytest
import torch
from atlasvid.engine.branch.apply import apply_detail_branch
from atlasvid.engine.comfyui import management
from atlasvid.engine.geometry.grid import Grid
from dense_reference import dense_forward
from test_detail import inputs, noised
from wan import forward, plan_of, rand, small_wan

CASES = [
    ((5, 14, 18), (2, 6, 8), 4, (2, 4, 4)),
    ((9, 11, 13), (3, 5, 6), 4, (3, 5, 4)),
]
ERROR = 0.02
"""Relative L1 error of three blocks, of which each tensor is rounded to 8 bits."""


@pytest.fixture(scope="module")
def halves():
    """A model with weights of bfloat16, and the same in float32."""
    half, full = small_wan(), small_wan()
    for module in half.model.diffusion_model.modules():
        if module is not half.model.diffusion_model.patch_embedding:  # as the stock loader keeps it
            for name, weight in module._parameters.items():
                if weight is not None:
                    rounded = torch.nn.Parameter(weight.bfloat16(), requires_grad=False)
                    module._parameters[name] = rounded
    state = {k: v.float() for k, v in half.model.diffusion_model.state_dict().items()}
    full.model.diffusion_model.load_state_dict(state)
    return half, full


@pytest.mark.parametrize("case", CASES, ids=["even", "odd"])
@pytest.mark.parametrize("weight", [1, 8], ids=["plain", "weighted"])
@pytest.mark.parametrize("overlap", ["shifted", "sliding"])
@pytest.mark.parametrize("guide_noise", ["clean", "matched"])
def test_half_precision_is_near_the_dense_reference(halves, case, weight, overlap, guide_noise):
    half, full = halves
    latent, proxy_latent, stride, window = case
    proxy = rand(1, 16, *proxy_latent, seed=4)
    x, t, context = inputs(latent)
    chosen = {"overlap": overlap, "guide_weight": weight}
    patched = apply_detail_branch(
        half, plan_of(latent, proxy_latent, stride), proxy, Grid(*window), guide_noise, **chosen
    )
    ours = forward(patched, x.bfloat16(), t, context.bfloat16())
    assert ours.dtype == torch.bfloat16
    guide, guide_t = noised(full, proxy, t, guide_noise)
    net = full.model.diffusion_model
    with torch.no_grad():
        dense = dense_forward(net, x, t, context, window, guide, guide_t, stride, **chosen)
    error = float((ours.float() - dense).abs().mean() / dense.abs().mean())
    assert error < ERROR, (error, management.device_name(management.compute_device()))
