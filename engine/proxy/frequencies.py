"""Scaled rotary positions, with which the model samples a proxy of few frames per second.

Wan rotates each head by three axes (time, height, width) of `axes_dim` channels. An embedder maps
ids [..., L, 3] to rotation matrices [..., 1, L, d/2, 2, 2]; all of them are linear in the position
(angle = position * frequency), so attention depends on differences of positions alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..geometry.grid import Grid
from ..geometry.plan import Plan
from ..geometry.windows import MAX_TRAINED_FRAMES

METHODS = ("linear", "ntk", "yarn", "riflex")
TRAINED_TOKENS = Grid(MAX_TRAINED_FRAMES, 30, 52)
"""Token grid of Wan's training clips at 480p, the context length of each axis."""
RIFLEX_FREQUENCY = 6
"""k, the intrinsic temporal frequency of Wan (RIFLEx, arXiv 2502.15894)."""
YARN_SLOW, YARN_FAST = 1.0, 32.0
"""Rotations over the trained length below which a frequency is scaled fully, above which not."""


def rope_frequencies(dim: int, theta: float = 10000.0) -> Tensor:
    """theta^(-2j/dim) for j = 0 .. dim/2 - 1, float64 (RoPE, arXiv 2104.09864)."""
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def ntk_frequencies(dim: int, scale: float, theta: float = 10000.0) -> Tensor:
    """NTK-aware scaling: theta * s^(dim / (dim - 2)), for a context s = 1 / scale times as long.

    The slowest frequency is multiplied by `scale`, the fastest stays.
    """
    return rope_frequencies(dim, theta * (1 / scale) ** (dim / (dim - 2)))


def yarn_frequencies(dim: int, scale: float, length: int, theta: float = 10000.0) -> Tensor:
    """YaRN's NTK-by-parts (arXiv 2309.00071, section 3.2), for s = 1 / scale.

    Frequencies that turn fewer than 1 time over `length` positions are multiplied by `scale`,
    those that turn more than 32 times stay, with a linear ramp between.
    """
    freqs = rope_frequencies(dim, theta)
    rotations = length * freqs / (2 * math.pi)
    keep = ((rotations - YARN_SLOW) / (YARN_FAST - YARN_SLOW)).clamp(0, 1)
    return freqs * (keep + (1 - keep) * scale)


def yarn_temperature(scale: float) -> float:
    """YaRN's factor on queries and keys, sqrt(1/t) = 0.1 ln(s) + 1 for s = 1 / scale > 1."""
    return 1.0 if scale >= 1 else 1.0 - 0.1 * math.log(scale)


def riflex_frequencies(
    dim: int, length: int, k: int = RIFLEX_FREQUENCY, theta: float = 10000.0
) -> Tensor:
    """RIFLEx: frequency k gets a period of at least length / 0.9, so that it does not repeat."""
    freqs = rope_frequencies(dim, theta)
    freqs[k - 1] = torch.minimum(freqs[k - 1], torch.tensor(0.9 * 2 * math.pi / length))
    return freqs


class ScaledRope(nn.Module):
    """A drop-in for the model's `rope_embedder` with given frequencies per axis.

    Args:
        frequencies: float64 [axes_dim[i] / 2] for time, height and width.
        gains: factor on queries and keys per axis (YaRN's temperature).
    """

    def __init__(self, frequencies: Sequence[Tensor], gains: Sequence[float] = (1.0, 1.0, 1.0)):
        super().__init__()
        self.axes_dim = [2 * len(f) for f in frequencies]
        self.dim = sum(self.axes_dim)
        self.theta = 10000.0
        self.frequencies = tuple(frequencies)
        self.gains = tuple(gains)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, L, 3] -> rotation matrices [B, 1, L, dim/2, 2, 2], float32."""
        angles = torch.cat(
            [ids[..., i, None].cpu().double() * freqs for i, freqs in enumerate(self.frequencies)],
            dim=-1,
        )
        gain = torch.cat(
            [torch.full_like(f, g) for f, g in zip(self.frequencies, self.gains, strict=True)]
        )
        cos, sin = angles.cos() * gain, angles.sin() * gain
        matrices = torch.stack([cos, -sin, sin, cos], dim=-1)
        matrices = rearrange(matrices, "b l d (i j) -> b 1 l d i j", i=2)
        return matrices.to(device=ids.device, dtype=torch.float32)


def scaled_rope(
    method: str, axes_dim: Sequence[int], temporal_scale: float, spatial_scale: float
) -> ScaledRope:
    """An embedder whose slow frequencies see positions times scale (NTK) or by parts (YaRN).

    Raises:
        ValueError: the method has no frequencies of its own.
    """
    scales = (temporal_scale, spatial_scale, spatial_scale)
    if method == "ntk":
        return ScaledRope([ntk_frequencies(d, s) for d, s in zip(axes_dim, scales, strict=True)])
    if method == "yarn":
        return ScaledRope(
            [
                yarn_frequencies(d, s, n)
                for d, s, n in zip(axes_dim, scales, TRAINED_TOKENS, strict=True)
            ],
            [yarn_temperature(s) for s in scales],
        )
    raise ValueError(f"method is {method!r}; with frequencies of its own are ntk and yarn.")


def apply_rope_method(
    model: Any, method: str, *, temporal_scale: float, spatial_scale: float, plan: Plan | None
) -> Any:
    """A clone of `model` whose temporal and spatial positions are scaled (docs/method.md: stage 1).

    With a plan, its temporal stride is the temporal scale.

    Raises:
        ValueError: unknown method, or a scale that is not above 0.
    """
    if plan is not None:
        temporal_scale = float(plan.temporal_stride)
    for name, scale in (("temporal_scale", temporal_scale), ("spatial_scale", spatial_scale)):
        if not scale > 0:
            raise ValueError(f"{name} is {scale}; it must be above 0 (1 changes nothing).")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed are {', '.join(METHODS)}.")

    clone = model.clone()
    embedder = model.get_model_object("diffusion_model.rope_embedder")
    axes_dim = list(embedder.axes_dim)
    if method in ("linear", "riflex"):
        # The stock options carry the linear part, so the stock forward and the detail branch agree.
        clone.set_model_rope_options(
            scale_x=spatial_scale,
            shift_x=0.0,
            scale_y=spatial_scale,
            shift_y=0.0,
            scale_t=temporal_scale,
            shift_t=0.0,
        )
    if method == "riflex":
        frames = plan.proxy_tokens.frames if plan else MAX_TRAINED_FRAMES
        length = round(temporal_scale * (frames - 1)) + 1
        rope = ScaledRope(
            [riflex_frequencies(axes_dim[0], length), *map(rope_frequencies, axes_dim[1:])]
        )
        clone.add_object_patch("diffusion_model.rope_embedder", rope)
    elif method in ("ntk", "yarn"):
        rope = scaled_rope(method, axes_dim, temporal_scale, spatial_scale)
        clone.add_object_patch("diffusion_model.rope_embedder", rope)
    return clone
