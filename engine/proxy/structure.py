"""Structure guidance: the sample's low frequencies are pulled towards the proxy's.

Method: D <- D + s(sigma) (LP(U) - LP(D)) on the predicted clean latent D, with U the up-scaled
proxy latent (UltraImageGen's low-pass guidance, here in space and time). LP works on cosine modes,
so no window or border is needed, and lets less of a mode through the finer it is, none at the
proxy's Nyquist frequency. A sharp cut there would be wrong: a VAE does not encode a picture's fine
half alike at two sizes, and forced upon the target it is seen as a weave.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..comfyui import models
from ..families.family import family_of
from ..geometry.grid import Grid
from ..geometry.plan import Plan
from .latents import require_proxy, upscale_proxy

KEY = "atlasvid_structure"


def cosine_modes(length: int, kept: int) -> Tensor:
    """The first `kept` rows of the orthonormal DCT-II of `length` samples: [kept, length]."""
    n = torch.arange(length, dtype=torch.float64)
    k = torch.arange(min(kept, length), dtype=torch.float64)[:, None]
    rows = torch.cos(math.pi / length * (n + 0.5) * k) * math.sqrt(2 / length)
    rows[0] /= math.sqrt(2)
    return rows


def fall_off(kept: int) -> Tensor:
    """The share of each mode that passes: 1 for the mean, then a raised cosine, 0 at `kept`."""
    k = torch.arange(kept, dtype=torch.float64)
    return 0.5 + 0.5 * torch.cos(math.pi * k / kept)


class LowPass:
    """Analysis and smoothed synthesis of the modes of a coarse grid within a fine one.

    Args:
        fine: latent size [T, H, W] of the target.
        coarse: latent size of the proxy, the number of modes kept per axis.
    """

    def __init__(self, fine: Grid, coarse: Grid):
        self.modes = [cosine_modes(n, m) for n, m in zip(fine, coarse, strict=True)]
        self.smooth = [fall_off(len(modes))[:, None] * modes for modes in self.modes]

    def analyse(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> coefficients [B, C, T', H', W'] of the kept modes."""
        time, height, width = (m.to(x) for m in self.modes)
        x = torch.einsum("bcthw,jw->bcthj", x, width)
        x = torch.einsum("bcthj,ih->bctij", x, height)
        return torch.einsum("bctij,st->bcsij", x, time)

    def synthesise(self, coefficients: Tensor) -> Tensor:
        """What passes of coefficients of `analyse`: [B, C, T, H, W]."""
        time, height, width = (m.to(coefficients) for m in self.smooth)
        x = torch.einsum("bcsij,st->bctij", coefficients, time)
        x = torch.einsum("bctij,ih->bcthj", x, height)
        return torch.einsum("bcthj,jw->bcthw", x, width)


def guidance_weight(sigma: float, sigma_end: float) -> float:
    """s(sigma): 1 at sigma 1, falling as a cosine to 0 at `sigma_end`, 0 below it."""
    progress = (sigma - sigma_end) / max(1.0 - sigma_end, 1e-8)
    return 0.5 - 0.5 * math.cos(math.pi * min(max(progress, 0.0), 1.0))


def apply_structure_guidance(
    model: Any, plan: Plan, proxy: Tensor, *, strength: float, end_percent: float
) -> Any:
    """A clone of `model` whose predicted latents take their low band from the proxy.

    Args:
        proxy: ComfyUI latent [B, C, F_g, H_g, W_g].
        strength: 0 changes nothing, 1 replaces all that passes LP at sigma 1.
        end_percent: part of the sampling after which nothing is changed.

    Raises:
        ValueError: unsupported model, or a proxy that does not match the plan.
    """
    family_of(model)
    require_proxy(proxy, plan)
    clone = model.clone()
    if strength == 0:
        return clone
    low_pass = LowPass(plan.latent, plan.proxy_latent)
    wanted = low_pass.analyse(
        upscale_proxy(models.process_latent_in(model, proxy.cpu().float()), plan)
    )
    sigma_end = models.percent_to_sigma(model, end_percent)

    def guide(args: dict) -> Tensor:
        denoised: Tensor = args["denoised"]
        weight = strength * guidance_weight(float(args["sigma"].max()), sigma_end)
        if weight == 0:
            return denoised
        if Grid(*denoised.shape[2:]) != plan.latent:
            raise ValueError(
                f"Structure guidance was planned for a latent of {plan.latent}; the sampler works "
                f"on {Grid(*denoised.shape[2:])}. Start from the same plan's detail latent."
            )
        difference = wanted.to(denoised) - low_pass.analyse(denoised)
        return denoised + low_pass.synthesise(weight * difference)

    clone.set_model_sampler_post_cfg_function(guide)
    return clone
