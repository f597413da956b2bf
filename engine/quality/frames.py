"""Frames: their checks, and resampling by exact areas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

Frames = Iterable[Tensor]
"""A video [T, H, W, 3], or its frames [H, W, 3] one after the other."""
Size = tuple[int, int]
"""Height and width in pixels."""

GREY_LEVELS = 255.0
LUMA = (0.2126, 0.7152, 0.0722)
"""Rec. 709."""


def require_frame(frame: Tensor) -> None:
    """Refuse what is not one frame [H, W, 3] of floats.

    Raises:
        ValueError: says what was given.
    """
    if frame.ndim != 3 or frame.shape[-1] != 3:
        raise ValueError(
            f"A frame is {tuple(frame.shape)}; expected is (height, width, 3), and a video is "
            "(frames, height, width, 3)."
        )
    if not frame.is_floating_point():
        raise ValueError(f"A frame is {frame.dtype}; expected is float, 0 to 1.")


def require_same_shape(a: Tensor, b: Tensor, what: str) -> None:
    """Refuse two tensors of different shape.

    Raises:
        ValueError: says both.
    """
    if a.shape != b.shape:
        raise ValueError(f"{what} differ in shape: {tuple(a.shape)} and {tuple(b.shape)}.")


def luma(frame: Tensor) -> Tensor:
    """Brightness of a frame [H, W, 3] -> [H, W]."""
    require_frame(frame)
    return frame @ frame.new_tensor(LUMA)


def shown_pairs(target: Frames, proxy: Frames, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Each proxy frame with the target frame that it shows: frame j shows frame stride * j.

    Raises:
        ValueError: the stride is below 1, or the two lengths do not belong together.
    """
    if stride < 1:
        raise ValueError(f"stride is {stride}; it must be at least 1.")
    shown = islice(target, 0, None, stride)
    count = 0
    for count, small in enumerate(proxy, 1):
        frame = next(shown, None)
        if frame is None:
            raise ValueError(
                f"The target ends before frame {stride * (count - 1)}, which proxy frame "
                f"{count - 1} shows at stride {stride}. Is the stride right?"
            )
        yield frame, small
    if next(shown, None) is not None:
        raise ValueError(
            f"The proxy ends after {count} frames, but the target has a frame {stride * count}, "
            f"which proxy frame {count} would show at stride {stride}. Is the stride right?"
        )


def area_means(frame: Tensor, rows: Sequence[float], columns: Sequence[float]) -> Tensor:
    """Mean colour of every box between neighbouring edges: [len(rows) - 1, len(columns) - 1, 3].

    Args:
        frame: [H, W, 3].
        rows: ascending edges in pixels, from 0 to H; a pixel cut by an edge counts in part.
        columns: likewise, from 0 to W.
    """
    require_frame(frame)
    return _means_along(_means_along(frame, rows, 0), columns, 1).to(frame.dtype)


def shrink(frame: Tensor, size: Size) -> Tensor:
    """A frame [H, W, 3] on a smaller grid [h, w, 3], each pixel the mean of the area it covers.

    Exact for any ratio, unlike adaptive pooling, whose areas overlap where the ratio is no integer.

    Raises:
        ValueError: the size is larger than the frame.
    """
    require_frame(frame)
    if min(size) < 1 or size[0] > frame.shape[0] or size[1] > frame.shape[1]:
        raise ValueError(
            f"Cannot shrink a frame of {tuple(frame.shape[:2])} (height, width) to {size}."
        )
    rows, columns = (
        [i * n / m for i in range(m + 1)] for n, m in zip(frame.shape, size, strict=False)
    )
    return area_means(frame, rows, columns)


def shrink_to_blocks(frame: Tensor, block: int) -> Tensor:
    """Mean of every block of block x block pixels, about so where it does not divide the size."""
    height, width = (max(1, round(n / block)) for n in frame.shape[:2])
    return shrink(frame, (height, width))


def enlarge(frame: Tensor, size: Size) -> Tensor:
    """A frame [h, w, 3] on a larger grid [H, W, 3], bicubic: what a plain up-scaler makes."""
    require_frame(frame)
    planes = frame.movedim(-1, 0)[None]
    large = F.interpolate(planes, size=size, mode="bicubic", align_corners=False)
    return large[0].movedim(0, -1)


def _means_along(x: Tensor, edges: Sequence[float], axis: int) -> Tensor:
    # A difference of running sums loses digits, hence float64.
    sums = x.double().cumsum(axis)
    sums = torch.cat([torch.zeros_like(sums.narrow(axis, 0, 1)), sums], axis)
    at = torch.tensor(edges, dtype=torch.float64, device=x.device)
    below = at.floor().long().clamp(max=x.shape[axis] - 1)
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    upto = torch.lerp(
        sums.index_select(axis, below),
        sums.index_select(axis, below + 1),
        (at - below).view(shape),
    )
    return upto.diff(dim=axis) / at.diff().view(shape)
