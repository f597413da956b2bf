"""Windows of the target grid."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor

from .grid import Grid

COMPACT = Grid(4, 16, 16)
"""1,024 tokens, for use with a guide LoRA; inferred from the paper's figures (docs/method.md)."""
MAX_TRAINED_FRAMES = 21
"""Latent frames of Wan's training clips."""


def trained_size(proxy_tokens: Grid) -> Grid:
    """The window that the base model was trained at: the proxy's own grid (FreeSwim's choice)."""
    frames = min(MAX_TRAINED_FRAMES, proxy_tokens.frames)
    return Grid(frames, proxy_tokens.height, proxy_tokens.width)


class Box(NamedTuple):
    """A box of tokens: where it starts and its size."""

    start: Grid
    size: Grid


def starts_of(boxes: list[Box], device: torch.device) -> Tensor:
    """Where boxes start: [boxes, 3]."""
    return torch.tensor([box.start for box in boxes], device=device)


def flat_index(grid: Grid, starts: Tensor, size: Grid, wrap: Grid | None = None) -> Tensor:
    """Raster index in `grid` of every token of boxes of one size: [boxes, tokens].

    Args:
        starts: [boxes, 3].
        wrap: where given, coordinates count modulo these sizes (a ring buffer along an axis).
    """
    coordinates = []
    for axis, n in enumerate(size):
        along = starts[:, axis, None] + torch.arange(n, device=starts.device)
        coordinates.append(along if wrap is None else along % wrap[axis])
    f, y, x = coordinates
    rows = f[:, :, None, None] * grid.height + y[:, None, :, None]
    return (rows * grid.width + x[:, None, None, :]).flatten(1)


def cuts(length: int, window: int, shifted: bool) -> tuple[int, ...]:
    """Borders of the windows along one axis, from 0 to `length`.

    Shifted cuts lie half a window earlier, so the first box and the last are smaller. A window
    that covers the axis is never cut.
    """
    if window >= length:
        return (0, length)
    first = window // 2 if shifted else 0
    inner = range(first or window, length, window)
    return (0, *inner, length)


@dataclass(frozen=True)
class ShiftedWindows:
    """Disjoint boxes that cover a grid; the cuts move by half a window on every odd block."""

    grid: Grid
    window: Grid

    def boxes(self, block: int) -> list[Box]:
        """The boxes of one block, in raster order."""
        shifted = block % 2 == 1
        axes = [
            [(a, b - a) for a, b in pairwise(cuts(n, w, shifted))]
            for n, w in zip(self.grid, self.window, strict=True)
        ]
        return [
            Box(Grid(*(p[0] for p in parts)), Grid(*(p[1] for p in parts)))
            for parts in product(*axes)
        ]

    def by_size(self, block: int) -> dict[Grid, list[Box]]:
        """The boxes of one block, grouped by size so that each group can be batched."""
        groups: dict[Grid, list[Box]] = defaultdict(list)
        for box in self.boxes(block):
            groups[box.size].append(box)
        return dict(groups)


@dataclass(frozen=True)
class SlidingWindows:
    """Query tiles of half a window; each reads a key window of fixed size centred on it.

    Key windows are clamped inward at borders, so that every query reads as many keys (FreeSwim's
    inward window, per tile instead of per token).
    """

    grid: Grid
    window: Grid

    @property
    def tile(self) -> Grid:
        return Grid(*(max(1, w // 2) for w in self.window))

    @property
    def axis(self) -> int:
        """The axis to stream along: the one on which a key window is shortest against the grid."""
        return min(range(3), key=lambda i: self.window[i] / self.grid[i])

    @property
    def ring(self) -> Grid:
        """Tokens whose keys and values are needed at a time: a key window's length of slices."""
        sizes = list(self.grid)
        sizes[self.axis] = self.window[self.axis]
        return Grid(*sizes)

    def tiles(self) -> list[Box]:
        """The query tiles, in raster order."""
        return ShiftedWindows(self.grid, self.tile).boxes(0)

    def keys(self, tile: Box) -> Box:
        """The key window of a tile."""
        start = (
            min(max(a + (size - w) // 2, 0), n - w)
            for a, size, w, n in zip(tile.start, tile.size, self.window, self.grid, strict=True)
        )
        return Box(Grid(*start), self.window)
