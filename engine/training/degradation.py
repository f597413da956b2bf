"""Low-quality versions of good frames, as cameras and the net make them."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Range = tuple[float, float]


@dataclass(frozen=True)
class Degradation:
    """Blur, down-scaling, noise and JPEG compression, in this order, drawn once per clip.

    Args:
        scale: how many times smaller the frames become.
        blur: standard deviation of a Gaussian, in pixels of the good frames.
        noise: standard deviation, where 1 is white; every frame has noise of its own.
        quality: of the compression, 1 to 95.

    Raises:
        ValueError: a scale below 1.
    """

    scale: int = 4
    blur: Range = (0.2, 2.0)
    noise: Range = (0.0, 0.04)
    quality: tuple[int, int] = (40, 95)

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise ValueError(f"scale is {self.scale}; frames can be made smaller, by 1 or more.")

    def __call__(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 [n, H, W, 3] -> uint8 [n, H / scale, W / scale, 3]"""
        blur, noise, quality = torch.rand(3, generator=generator).tolist()
        images = frames.movedim(-1, 1).float() / 255
        images = blurred(images, _between(self.blur, blur))
        height, width = (max(1, side // self.scale) for side in images.shape[-2:])
        images = F.interpolate(images, (height, width), mode="area")
        strength = _between(self.noise, noise)
        images = images + strength * torch.randn(images.shape, generator=generator)
        levels = (images * 255).round().clamp(0, 255).byte().movedim(1, -1)
        return compressed(levels, round(_between(self.quality, quality)))


def _between(bounds: Range, share: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * share


def blurred(images: Tensor, sigma: float) -> Tensor:
    """[n, 3, H, W] through a Gaussian of standard deviation `sigma` pixels, edges repeated."""
    radius = max(1, round(3 * sigma))
    places = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-(places**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)
    for turned in (kernel, kernel.transpose(-1, -2)):
        margin = (radius, radius, 0, 0) if turned is kernel else (0, 0, radius, radius)
        images = F.conv2d(F.pad(images, margin, "replicate"), turned, groups=images.shape[1])
    return images


def compressed(frames: Tensor, quality: int) -> Tensor:
    """uint8 [n, H, W, 3] as JPEG gives them back."""
    out = []
    for frame in frames.numpy():
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=quality)
        out.append(torch.from_numpy(np.array(Image.open(file))))
    return torch.stack(out)
