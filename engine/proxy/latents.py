"""Resampling of latents between the proxy's grid and the target's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..comfyui import management
from ..device.budget import size
from ..geometry.alignment import lead, temporal_positions
from ..geometry.grid import Grid
from ..geometry.plan import Plan


def empty_latent(channels: int, grid: Grid) -> Tensor:
    """Zeros [1, channels, *grid] where nodes keep the tensors that they hand to each other.

    Raises:
        ValueError: the computer's whole memory could not hold it.
    """
    needed, there = 4 * channels * grid.count, management.total_memory(torch.device("cpu"))
    if needed > there:
        raise ValueError(
            f"A latent of {grid} (frames x height x width) takes {size(needed)}; this computer "
            f"has {size(there)} of memory. Plan a smaller or shorter video."
        )
    return torch.zeros((1, channels, *grid), device=management.intermediate_device())


def require_shape(samples: Tensor, expected: Grid, channels: int, what: str, advice: str) -> None:
    """Refuse a latent that is not [B, channels, frames, height, width] of the expected size.

    Raises:
        ValueError: says what was given, what the plan expects and what to change.
    """
    if samples.ndim != 5:
        raise ValueError(
            f"The {what} latent has {samples.ndim} dimensions {tuple(samples.shape)}; a video "
            "latent has 5 (batch, channels, frames, height, width). Was it made by an image model?"
        )
    if samples.shape[1] != channels:
        raise ValueError(
            f"The {what} latent has {samples.shape[1]} channels; the planned model works with "
            f"{channels}. It comes from another model family (Wan 2.1 and 2.2 A14B have 16, "
            "Wan 2.2 TI2V-5B has 48)."
        )
    given = Grid(*samples.shape[2:])
    if given != expected:
        raise ValueError(
            f"The {what} latent is {given} (frames x height x width); the plan expects "
            f"{expected}. {advice}"
        )


def require_proxy(samples: Tensor, plan: Plan) -> None:
    """Refuse a proxy latent that does not belong to the plan or is not finite.

    Raises:
        ValueError: says which, and what to change.
    """
    require_shape(
        samples,
        plan.proxy_latent,
        plan.space.channels,
        "proxy",
        "Sample it from the plan's proxy_latent output, with the same plan.",
    )
    if not samples.isfinite().all():
        raise ValueError(
            "The proxy latent contains NaN or infinite values. The proxy's sampling broke: check "
            "its model, precision and LoRA strengths."
        )


def temporal_index(frames: int, stride: int, device: torch.device | None = None) -> Tensor:
    """The fractional proxy latent that shows each target latent: the inverse of P_t, clamped."""
    f = torch.arange(frames, device=device, dtype=torch.float32)
    first = stride - lead(stride)  # P_t(1)
    index = torch.where(f < first, f / first, (f + lead(stride)) / stride)
    return index.clamp(max=(frames - 1) // stride)


def upscale_proxy(samples: Tensor, plan: Plan) -> Tensor:
    """The proxy latent [B, C, F_g, H_g, W_g] on the target's latent grid [B, C, F, H, W].

    Bicubic in space, linear in time between the aligned positions (method: aligned positions).
    """
    target = plan.latent
    batch, channels, proxy_frames = samples.shape[:3]
    flat = samples.float().transpose(1, 2).flatten(0, 1)
    large = F.interpolate(flat, size=target[1:], mode="bicubic", align_corners=False)
    large = large.unflatten(0, (batch, proxy_frames)).transpose(1, 2)
    index = temporal_index(target.frames, plan.temporal_stride)
    low = index.floor().long()
    high = (low + 1).clamp(max=proxy_frames - 1)
    out = samples.new_empty((batch, channels, *target), dtype=torch.float32)
    for f in range(target.frames):
        weight = float(index[f] - low[f])
        torch.lerp(large[:, :, low[f]], large[:, :, high[f]], weight, out=out[:, :, f])
    return out.to(samples.dtype)


def shrink_condition(condition: Tensor, guide: Grid, stride: int) -> Tensor:
    """Image-to-video channels [B, C, F, H, W] on the guide's grid [B, C, F_g, H_g, W_g].

    Mean over the covered area in space, the nearest aligned frame in time.
    """
    index = [round(position) for position in temporal_positions(guide.frames, stride)]
    picked = condition[:, :, index].transpose(1, 2).flatten(0, 1)
    small = F.interpolate(picked.float(), size=guide[1:], mode="area")
    small = small.unflatten(0, (condition.shape[0], guide.frames)).transpose(1, 2)
    return small.to(condition.dtype)
