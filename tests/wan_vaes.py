"""Small random Wan VAEs, loaded by ComfyUI's own loader code."""

import math
from unittest import mock

import comfy.ldm.wan.vae
import comfy.ldm.wan.vae2_2
import comfy.sd
import torch
from torch import nn

LAYOUT = {
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
}


def _randomise(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Weights that keep activations near unit variance, so that every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gamma"):
            parameter.data = 1 + 0.2 * noise
        elif parameter.ndim > 1:
            parameter.data = noise / math.sqrt(parameter[0].numel())
        else:
            parameter.data = 0.1 * noise
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def wan21_state(dim: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    return _randomise(comfy.ldm.wan.vae.WanVAE(dim=dim, z_dim=16, **LAYOUT), seed)


def wan21_vae(dim: int = 8, seed: int = 0) -> comfy.sd.VAE:
    return comfy.sd.VAE(sd=wan21_state(dim, seed))


def wan22_vae(dim: int = 8, seed: int = 0) -> comfy.sd.VAE:
    """The stock loader fixes Wan 2.2's width at 160 / 256, so its class is built narrower."""
    real = comfy.ldm.wan.vae2_2.WanVAE

    def narrow(**settings):
        return real(**{**settings, "dim": dim, "dec_dim": dim})

    state = _randomise(narrow(z_dim=48, **LAYOUT), seed)
    with mock.patch.object(comfy.ldm.wan.vae2_2, "WanVAE", narrow):
        return comfy.sd.VAE(sd=state)
