"""Where the windows of a layout meet, in frames and pixels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ..geometry.grid import Grid
from ..geometry.layout import Layout
from ..geometry.windows import Box, SlidingWindows


@dataclass(frozen=True)
class Lines:
    """Borders along one axis; the line at p lies between the pixels (frames) p - 1 and p."""

    length: int
    cuts: tuple[int, ...]
    """Borders of tokens at which windows meet, ascending."""
    others: tuple[int, ...]
    """All other borders of tokens: what is there is the VAE's grid, no seam."""

    @property
    def edges(self) -> tuple[int, ...]:
        """Borders of the windows, with the two ends."""
        return (0, *self.cuts, self.length)


class WindowLines(NamedTuple):
    """The lines of a window layout along each axis of the video."""

    frames: Lines
    rows: Lines
    columns: Lines


def window_lines(
    boxes: Iterable[Box], video: Grid, pixels_per_token: int = 16, frames_per_latent: int = 4
) -> WindowLines:
    """Where boxes of tokens meet in the video made from them.

    For seams give the boxes of all blocks (`windows.boxes(0) + windows.boxes(1)`, or a sliding
    layout's `tiles()`), for the windows of one block its own.

    Args:
        boxes: in tokens.
        video: frames, height, width in pixels; where the last token is partly outside, so is it.
        frames_per_latent: the first latent frame is one frame, each further one this many.
    """
    boxes = list(boxes)
    borders = (
        range(1, video.frames, frames_per_latent),
        range(pixels_per_token, video.height, pixels_per_token),
        range(pixels_per_token, video.width, pixels_per_token),
    )
    lines = []
    for axis, (length, along) in enumerate(zip(video, borders, strict=True)):
        # Token i begins at border i - 1: the start of the video is no border.
        starts = {box.start[axis] for box in boxes}
        cuts = tuple(p for i, p in enumerate(along, 1) if i in starts)
        others = tuple(p for i, p in enumerate(along, 1) if i not in starts)
        lines.append(Lines(length, cuts, others))
    return WindowLines(*lines)


class LayoutLines(NamedTuple):
    """Where the windows of a layout meet."""

    all_blocks: WindowLines
    """In any block of the model: where seams may show."""
    block: WindowLines
    """In the first one alone: windows that do not overlap."""


def layout_lines(layout: Layout) -> LayoutLines:
    """The lines of what the detail branch computes by."""
    plan, windows = layout.plan, layout.windows
    video = Grid(plan.frames, plan.height, plan.width)
    pixels = plan.space.spatial * plan.space.patch[1]
    if isinstance(windows, SlidingWindows):
        lines = window_lines(windows.tiles(), video, pixels, plan.space.temporal)
        return LayoutLines(lines, lines)
    boxes = windows.boxes(0), windows.boxes(1)
    return LayoutLines(
        window_lines([*boxes[0], *boxes[1]], video, pixels, plan.space.temporal),
        window_lines(boxes[0], video, pixels, plan.space.temporal),
    )
