"""Colour drift: how far each window's mean colour strays from the proxy's."""

from __future__ import annotations

from bisect import bisect
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from .frames import GREY_LEVELS, Frames, area_means, require_frame, shown_pairs, shrink
from .lines import WindowLines


def window_drift(target: Frames, proxy: Frames, stride: int, lines: WindowLines) -> Tensor:
    """Mean colour of every window less that of the same region of the proxy, in grey levels.

    Args:
        target: the size that the lines were made for.
        proxy: frame j shows the target's frame stride * j.
        lines: of one block's windows.

    Returns:
        [windows in time, down, across, 3]. Windows in time none of whose frames the proxy shows are
        left out.

    Raises:
        ValueError: lengths that do not belong together, or lines for another size.
    """
    drifts = {}
    for j, (frame, small) in enumerate(shown_pairs(target, proxy, stride)):
        _require_size(frame, lines)
        # Both on the proxy's grid: its pixels that lie across a border mix two windows' colours,
        # which would look like drift of a perfect video.
        drifts[stride * j] = frame_drift(shrink(frame, _size(small)) - small, lines)
    return means_in_time(drifts, lines)


def frame_drift(difference: Tensor, lines: WindowLines) -> Tensor:
    """Drift of every window in one frame, in grey levels: [windows down, across, 3].

    Args:
        difference: the target's frame shrunk to the proxy's size, less the proxy's [h, w, 3].
    """
    edges = (
        [edge * n / axis.length for edge in axis.edges]
        for n, axis in zip(difference.shape, (lines.rows, lines.columns), strict=False)
    )
    return GREY_LEVELS * area_means(difference, *edges)


def means_in_time(drifts: Mapping[int, Tensor], lines: WindowLines) -> Tensor:
    """Means over each window in time of drifts by frame: [windows in time, down, across, 3]."""
    in_time: dict[int, list[Tensor]] = defaultdict(list)
    for frame, drift in drifts.items():
        in_time[bisect(lines.frames.cuts, frame)].append(drift)
    return torch.stack([torch.stack(each).mean(0) for each in in_time.values()])


def rms_drift(drift: Tensor) -> float:
    """Root mean square over windows and channels, in grey levels."""
    return float(drift.double().square().mean().sqrt())


def worst_drift(drift: Tensor) -> float:
    """The largest of any window, root mean square over its channels, in grey levels."""
    return float(drift.double().square().mean(-1).sqrt().max())


def _size(frame: Tensor) -> tuple[int, int]:
    return frame.shape[0], frame.shape[1]


def _require_size(frame: Tensor, lines: WindowLines) -> None:
    require_frame(frame)
    made_for = lines.rows.length, lines.columns.length
    if frame.shape[:2] != made_for:
        raise ValueError(
            f"The frames are {frame.shape[0]} x {frame.shape[1]} (height x width); the lines were "
            f"made for {made_for[0]} x {made_for[1]}."
        )
