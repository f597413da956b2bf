"""Optical flow of a rendered video, estimated: for videos of which nobody knows the motion.

Coarse to fine, Lucas and Kanade's least squares over a neighbourhood at every level. What is
matched is texture: brightness less its local mean, so that flicker does not pass for motion.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .flow import warp
from .frames import Size, luma

COARSEST = 12
"""Pixels of the shorter side of the coarsest level, about."""
REACH = 4
"""Pixels on either side that are taken to move alike."""
ROUNDS = 3
"""Improvements per level."""
FLATNESS = 1e-5
"""Squared gradient below which there is nothing to go by: the motion of the coarser level stays."""


def estimate_flow(now: Tensor, following: Tensor) -> Tensor:
    """Flow from a frame [H, W, 3] to the next one: [H, W, 2] in pixels, x before y.

    Finds motions of up to about a third of the shorter side. Large frames are better shrunk first:
    time grows with their area.
    """
    levels = [(luma(now), luma(following))]
    while min(levels[-1][0].shape) >= 2 * COARSEST:
        a, b = levels[-1]
        levels.append((_halved(a), _halved(b)))
    flow = now.new_zeros(*levels[-1][0].shape, 2)
    for level in reversed(levels):
        a, b = map(_texture, level)
        flow = _enlarged(flow, (a.shape[0], a.shape[1]))
        for _ in range(ROUNDS):
            flow = _smoothed(flow + _step(a, b, flow))
    return flow


def _step(a: Tensor, b: Tensor, flow: Tensor) -> Tensor:
    """What least squares over each neighbourhood adds to the flow, at most a pixel."""
    fetched, inside = warp(b[..., None], flow)
    fetched = fetched[..., 0]
    x, y = _gradients((a + fetched) / 2)
    missed = (fetched - a) * inside
    products = torch.stack([x * x, x * y, y * y, x * missed, y * missed])
    xx, xy, yy, xm, ym = _box(products, REACH)
    xx, yy = xx + FLATNESS, yy + FLATNESS
    determinant = xx * yy - xy * xy
    u, v = (xy * ym - yy * xm) / determinant, (xy * xm - xx * ym) / determinant
    return torch.stack([u, v], -1).clamp(-1, 1)


def _texture(brightness: Tensor) -> Tensor:
    """Brightness [H, W] less its mean over a neighbourhood."""
    return brightness - _box(brightness[None], REACH + 2)[0]


def _gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    padded = F.pad(x[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    across = (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2
    down = (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2
    return across, down


def _box(planes: Tensor, reach: int) -> Tensor:
    """Means [n, H, W] over squares of 2 reach + 1 pixels, of what lies inside the frame."""
    side = 2 * reach + 1
    return F.avg_pool2d(planes[None], side, 1, reach, count_include_pad=False)[0]


def _smoothed(flow: Tensor) -> Tensor:
    return _box(flow.movedim(-1, 0), 2).movedim(0, -1)


def _halved(x: Tensor) -> Tensor:
    return F.interpolate(x[None, None], scale_factor=0.5, mode="area")[0, 0]


def _enlarged(flow: Tensor, size: Size) -> Tensor:
    """A flow on another grid, its pixels counted on that one."""
    height, width = flow.shape[:2]
    planes = F.interpolate(flow.movedim(-1, 0)[None], size=size, mode="bilinear")[0]
    scale = flow.new_tensor([size[1] / width, size[0] / height])
    return planes.movedim(0, -1) * scale
