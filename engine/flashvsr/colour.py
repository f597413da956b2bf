"""Gives decoded frames the colours of the low-quality frames that they were made from.

All frames are [n, 3, height, width] in [-1, 1], without padding, which would count as picture.
Every frame is corrected by itself, so a clip can be corrected a few frames at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-5
"""Added to a variance, so that a frame of one colour divides by something."""
DILATIONS = (1, 2, 4, 8, 16)
"""Of the five blurs that leave the low frequencies."""


def adain(frames: Tensor, reference: Tensor) -> Tensor:
    """Mean and spread of each channel as in the reference (adaptive instance normalisation)."""
    mean, spread = _statistics(frames)
    wanted_mean, wanted_spread = _statistics(reference)
    return ((frames - mean) / spread * wanted_spread + wanted_mean).clamp(-1, 1)


def _statistics(frames: Tensor) -> tuple[Tensor, Tensor]:
    variance = frames.var((-2, -1), correction=0, keepdim=True)
    return frames.mean((-2, -1), keepdim=True), (variance + EPSILON).sqrt()


def wavelet(frames: Tensor, reference: Tensor) -> Tensor:
    """The reference's low frequencies under the frames' own high ones.

    frames - low(frames) + low(reference); the blur is linear, so one does for both.
    """
    return (frames + low_frequencies(reference - frames)).clamp(-1, 1)


def low_frequencies(frames: Tensor) -> Tensor:
    """Five blurs with [1 2 1] x [1 2 1] / 16, each twice as wide as the one before."""
    for dilation in DILATIONS:
        frames = _blurred(_blurred(frames, -1, dilation), -2, dilation)
    return frames


def _blurred(frames: Tensor, axis: int, dilation: int) -> Tensor:
    """[1 2 1] / 4 along an axis, edges repeated."""
    length = frames.shape[axis]
    sides = (dilation, dilation, 0, 0) if axis == -1 else (0, 0, dilation, dilation)
    padded = F.pad(frames, sides, mode="replicate")
    before, middle, after = (padded.narrow(axis, i * dilation, length) for i in range(3))
    return (before + after).add_(middle, alpha=2).div_(4)


def unchanged(frames: Tensor, reference: Tensor) -> Tensor:
    """The frames as they are."""
    return frames


METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "adain": adain,
    "wavelet": wavelet,
    "off": unchanged,
}


def colour_method(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The correction of a name: (frames, reference) -> frames.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in METHODS:
        raise ValueError(f"colour is {name!r}; allowed are {', '.join(METHODS)}.")
    return METHODS[name]
