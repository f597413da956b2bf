"""The proxy's frequency band, and what lies above it.

The border between the two is the proxy's Nyquist frequency. Frames are split into the cosine modes
that a grid of the proxy's size can hold and the others: a projection, so the two parts are
orthogonal and their energies add.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .frames import Frames, Size, require_frame, require_same_shape, shown_pairs, shrink

NOTHING = 1e-5
"""Root mean square that counts as none: the noise of float32. It keeps every decibel finite."""


def low_pass(frame: Tensor, size: Size) -> Tensor:
    """The part of a frame [H, W, 3] that a grid of `size` can hold."""
    require_frame(frame)
    return _keep_modes(_keep_modes(frame, size[0], 0), size[1], 1)


def high_pass(frame: Tensor, size: Size) -> Tensor:
    """The part of a frame [H, W, 3] above the Nyquist frequency of a grid of `size`."""
    return frame - low_pass(frame, size)


def proxy_errors(target: Frames, proxy: Frames, stride: int) -> Tensor:
    """Mean squared error, one per proxy frame, of the target shrunk to the proxy's size: [F].

    Raises:
        ValueError: lengths that do not belong together, or a proxy larger than the target.
    """
    errors = []
    for frame, small in shown_pairs(target, proxy, stride):
        require_frame(small)
        height, width = small.shape[:2]
        errors.append((shrink(frame, (height, width)) - small).square().mean())
    return torch.stack(errors)


def low_band_errors(video: Frames, reference: Frames, size: Size) -> Tensor:
    """Mean squared error per frame between two clips of one size, below a proxy's Nyquist: [T].

    Raises:
        ValueError: the clips differ in size or length.
    """
    errors = []
    for frame, wanted in zip(video, reference, strict=True):
        require_same_shape(frame, wanted, "The frames of the two clips")
        errors.append(low_pass(frame - wanted, size).square().mean())
    return torch.stack(errors)


def high_band_energies(video: Frames, size: Size) -> Tensor:
    """Mean square per frame of what lies above the Nyquist frequency of a proxy of `size`: [T]."""
    return torch.stack([high_pass(frame, size).square().mean() for frame in video])


def rms(energies: Tensor) -> float:
    """Root of the mean of mean squares; nan of none."""
    return float(energies.double().mean().sqrt())


def psnr(errors: Tensor) -> float:
    """Peak signal to noise ratio in dB of mean squared errors, for a peak of 1; at most 100."""
    return -decibels(rms(errors), 1.0)


def decibels(level: float, reference: float) -> float:
    """20 log10 of the ratio of two root mean squares; 0 where they are the same."""
    return 20 * math.log10(max(level, NOTHING) / max(reference, NOTHING))


def _keep_modes(x: Tensor, modes: int, axis: int) -> Tensor:
    """Cosine modes below `modes`: they are the Fourier modes of the signal and its mirror image."""
    length = x.shape[axis]
    if modes >= length:
        return x
    spectrum = torch.fft.rfft(torch.cat([x, x.flip(axis)], axis), dim=axis)
    spectrum.narrow(axis, modes, length + 1 - modes).zero_()
    return torch.fft.irfft(spectrum, n=2 * length, dim=axis).narrow(axis, 0, length)
