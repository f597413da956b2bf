"""What optical flow shows: whether texture follows the motion, and whether brightness flickers.

Flow [H, W, 2] is in pixels, x before y: what is at (x, y) in a frame is at (x + u, y + v) in the
next one. Where it comes from, a world that knows it or an estimator, is the caller's choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise, repeat

import torch
import torch.nn.functional as F
from torch import Tensor

from .bands import rms
from .frames import GREY_LEVELS, Frames, require_frame, shrink_to_blocks
from .seams import signed_root


def warp(frame: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Fetch the next frame back along the flow, bicubically.

    Args:
        frame: the next frame (or its flow, or any other channels), [H, W, C].
        flow: from this frame to the next, [H, W, 2].

    Returns:
        The next frame as seen from this one [H, W, C], and which pixels come from inside it [H, W].

    Raises:
        ValueError: frame and flow differ in size.
    """
    height, width = frame.shape[:2]
    if flow.shape != (height, width, 2):
        raise ValueError(
            f"The flow is {tuple(flow.shape)}; a frame of {height} x {width} pixels (height x "
            f"width) needs ({height}, {width}, 2)."
        )
    at = flow.to(frame) + _pixel_positions(height, width).to(frame)
    last = at.new_tensor([width - 1, height - 1])
    inside = ((at >= 0) & (at <= last)).all(-1)
    grid = (2 * at + 1) / (last + 1) - 1
    warped = F.grid_sample(
        frame.movedim(-1, 0)[None],
        grid[None],
        mode="bicubic",
        padding_mode="border",
        align_corners=False,
    )
    return warped[0].movedim(0, -1), inside


def is_visible(
    flow: Tensor, backward: Tensor, relative: float = 0.01, floor: float = 0.5
) -> Tensor:
    """Which pixels of a frame are seen in the next one too: forward-backward check, [H, W].

    There and back must lead home: |w + w'|^2 < relative (|w|^2 + |w'|^2) + floor (Sundaram et al.,
    ECCV 2010, whose constants are the defaults).

    Args:
        flow: from this frame to the next, [H, W, 2].
        backward: from the next frame to this one, [H, W, 2].
    """
    back, inside = warp(backward, flow)
    miss = (flow + back).square().sum(-1)
    length = flow.square().sum(-1) + back.square().sum(-1)
    return inside & (miss < relative * length + floor)


def warping_errors(
    video: Frames, flows: Iterable[Tensor], visible: Iterable[Tensor] | None = None
) -> Tensor:
    """Mean squared error of each frame against the next one fetched along the flow: [T - 1].

    A blurred video has low errors, whatever its faults, as has a slow one; so compare with the
    truth's own by `rms_beyond`, and with `bands.high_band_energies`.

    Args:
        video: values from 0 to 1.
        flows: [T - 1, H, W, 2].
        visible: [T - 1, H, W] boolean, what to compare; without it all that stays in the frame.

    Returns:
        Mean squares of values from 0 to 1, nan for a pair of which nothing is to be compared.
    """
    energies = [
        difference[seen].square().mean() for difference, seen in _changes(video, flows, visible)
    ]
    return torch.stack(energies) if energies else torch.empty(0)


def flicker_energies(
    video: Frames,
    flows: Iterable[Tensor],
    visible: Iterable[Tensor] | None = None,
    block: int = 16,
) -> Tensor:
    """Mean square of the changes of brightness along the flow, from frame to frame: [T - 1].

    Means over blocks are compared, so that texture that is out of place does not count: that is
    `warping_errors`. Brightness that jumps up and down by a has the root mean square 2 a. Arguments
    as there.
    """
    energies = []
    for difference, seen in _changes(video, flows, visible):
        weighted = shrink_to_blocks(difference * seen[..., None], block)
        share = shrink_to_blocks(seen[..., None].to(difference).expand_as(difference), block)
        mostly = share > 0.5
        energies.append((weighted[mostly] / share[mostly]).square().mean())
    return torch.stack(energies) if energies else torch.empty(0)


def rms_in_grey_levels(energies: Tensor) -> float:
    """Root of the mean of mean squares, in grey levels; pairs without a value are left out.

    nan where there is none, as for a single frame.
    """
    return GREY_LEVELS * rms(energies[~energies.isnan()])


def rms_beyond(energies: Tensor, truth: Tensor) -> float:
    """What mean squares hold beyond the truth's own, as a root mean square in grey levels.

    Interpolation and flow have errors of their own, also for a perfect video; the energies of
    independent errors add, so those are subtracted. Below 0 where the truth has more.
    """
    a, b = rms_in_grey_levels(energies), rms_in_grey_levels(truth)
    return signed_root(a * a - b * b)


def _changes(
    video: Frames, flows: Iterable[Tensor], visible: Iterable[Tensor] | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The change of every pixel along the flow [H, W, 3], and where it counts [H, W]."""
    coming, masks = iter(flows), iter(repeat(None) if visible is None else visible)
    for index, (now, following) in enumerate(pairwise(video)):
        require_frame(now)
        flow, seen = next(coming, None), next(masks, None)
        if flow is None or (seen is None and visible is not None):
            what = "flow" if flow is None else "a mask of what is visible"
            raise ValueError(
                f"There is {what} for {index} pairs of frames, but the video has more. A video "
                "needs one less than it has frames."
            )
        warped, inside = warp(following, flow)
        yield warped - now, inside if seen is None else inside & seen


def _pixel_positions(height: int, width: int) -> Tensor:
    """x and y of every pixel: [H, W, 2]."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y], -1)
