"""Trains the world's FlashVSR: a one-step student of a small Wan that sees low-quality frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .latents import LatentCode
from .scenes import FPS, SPAN, random_scene, random_view, render

SIDE, FRAMES = 256, 33
"""Of a training clip, 2 x 2 blocks: 33 frames are read for 8 latent frames, 29 frames."""
LATENT_FRAMES = (FRAMES - 1) // 4
CONFIG = {"dim": 128, "ffn_dim": 256, "num_heads": 1, "num_layers": 3, "text_dim": 4096}
PROJECTION = (64, 96, 128)
SCALE = 4


def random_pair(rng: np.random.Generator, code: LatentCode) -> tuple[Tensor, Tensor]:
    """A part of a large picture [3, F, 256, 256], and it at a quarter of its size, both uint8.

    The small one is what an artist gives: drawn frames or, in half of the clips, frames that went
    through the latent space, with a little noise.
    """
    scene = random_scene(rng)
    start = rng.uniform(0, SPAN - (FRAMES - 1) / FPS)
    times = start + np.arange(FRAMES) / FPS
    zoom = float(np.exp(rng.uniform(np.log(1.4), np.log(4.5))))
    view = random_view(scene, rng, SIDE, SIDE, zoom, float(times[FRAMES // 2]))
    large = render(scene, view, times)
    small = F.interpolate(large.movedim(1, 0), scale_factor=1 / SCALE, mode="area").movedim(0, 1)
    if rng.random() < 0.5:
        small = (code.decode(code.encode(small[None] * 2 - 1))[0] + 1) / 2
    small = small + float(rng.uniform(0, 0.02)) * torch.randn(
        small.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**31)))
    )
    return as_bytes(large), as_bytes(small)


def as_bytes(video: Tensor) -> Tensor:
    """0..1 to uint8."""
    return (video * 255).round().clamp(0, 255).byte()


def enlarged(small: Tensor) -> Tensor:
    """[N, 3, F, h, w] uint8 -> up-scaled by four in -1..1, as PIL's bicubic to one grey level."""
    n = len(small)
    frames = small.movedim(2, 1).flatten(0, 1)
    large = F.interpolate(frames, scale_factor=SCALE, mode="bicubic", antialias=True)
    return large.unflatten(0, (n, -1)).movedim(1, 2).float() / 127.5 - 1


def block_mask(latent_frames: int, kv_ratio: int = 3) -> Tensor:
    """Which latent frames [T, T] see which: the schedule's chunks with their cache."""
    mask = torch.zeros(latent_frames, latent_frames, dtype=torch.bool)
    mask[:6, :6] = True
    for first in range(6, latent_frames, 2):
        mask[first : first + 2, max(0, first - 2 * kv_ratio) : first + 2] = True
    return mask


class Student(nn.Module):
    """A Wan with its LQ projection, on whole clips: chunks are a mask here.

    At most 30 blocks fit into the published budget, so nothing else of the sparse rule binds.
    """

    def __init__(self, net: nn.Module, projection: nn.Module, prompt: Tensor) -> None:
        super().__init__()
        self.net, self.projection = net, projection
        self.register_buffer("prompt", prompt)

    def tokens(self, enlarged: Tensor) -> Tensor:
        """[N, 3, F, H, W] -> [N, C, T, H / 16, W / 16], by version v1.1."""
        n, c, f, h, w = enlarged.shape
        x = enlarged.view(n, c, f, h // 16, 16, w // 16, 16).permute(0, 1, 4, 6, 2, 3, 5)
        x = x.reshape(n, c * 256, f, h // 16, w // 16)
        x = torch.cat([x[:, :, :1].expand(-1, -1, 5, -1, -1), x], dim=2)
        p = self.projection
        for conv, norm in ((p.conv1, p.norm1), (p.conv2, p.norm2)):
            x = F.silu(norm(conv(F.pad(x, (1, 1, 1, 1, 0, 0), mode="replicate"))))
        return p.linear_layers[0](x.movedim(1, -1)).movedim(-1, 1)

    def velocity(self, x: Tensor, sigma: Tensor, shown: Tensor) -> Tensor:
        """x [N, 16, T, h, w] at noise levels [N] beside low-quality tokens."""
        hook = self.net.patch_embedding.register_forward_hook(
            lambda _, __, out: out + shown.to(out)
        )
        mask = block_mask(x.shape[2]).repeat_interleave(shown.shape[-2] * shown.shape[-1], 0)
        mask = mask.repeat_interleave(shown.shape[-2] * shown.shape[-1], 1)

        def attention(_: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, **__: object):
            q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))
            own = mask if q.shape[-2] == k.shape[-2] else None
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=own)
            return out.transpose(1, 2).flatten(2)

        options = {"optimized_attention_override": attention}
        text = self.prompt.expand(len(x), -1, -1)
        try:
            return self.net(x, sigma * 1000, text, transformer_options=options)
        finally:
            hook.remove()

    def forward(self, noise: Tensor, enlarged: Tensor) -> Tensor:
        """The clean latent in one step."""
        one = noise.new_ones(len(noise))
        return noise - self.velocity(noise, one, self.tokens(enlarged))


@dataclass(frozen=True)
class VsrRecipe:
    """How the student is trained."""

    steps: int = 3000
    cooldown: int = 800
    warmup: int = 50
    batch: int = 4
    rate: float = 2e-3
    seed: int = 0

    def factor(self, step: int) -> float:
        """On the learning rate."""
        return min((step + 1) / self.warmup, 1.0, (self.steps - step) / self.cooldown)
