"""Windows of the target grid and the guide tokens aligned with them (AtlasVid section 3.3).

All positions are in target token units.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor

from .grid import Grid

COMPACT = Grid(4, 16, 16)
"""1,024 tokens, the paper's window, for use with a guide LoRA."""
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


@dataclass(frozen=True)
class GuideAlignment:
    """Where guide tokens sit on the target grid, and which of them a window reads.

    A window reads the guide tokens inside itself grown by one guide token on every side: per axis
    floor(window / spacing) + 2 of them, those nearest to the window's centre. The count is the
    same for every window, also for the smaller boxes at the border, so windows can be batched.

    Args:
        margin: guide tokens more on every side, as far as the guide reaches.
    """

    target: Grid
    guide: Grid
    temporal_stride: int
    window: Grid
    margin: int = 0

    @cached_property
    def positions(self) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
        """P_t, P_y, P_x: the position of every guide index, per axis, in target token units."""
        r = self.temporal_stride
        time = tuple(0.0 if k == 0 else r * k - 0.375 * (r - 1) for k in range(self.guide.frames))
        return (
            time,
            _cell_centres(self.guide.height, self.target.height),
            _cell_centres(self.guide.width, self.target.width),
        )

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Target tokens per guide token, per axis."""
        return (
            float(self.temporal_stride),
            self.target.height / self.guide.height,
            self.target.width / self.guide.width,
        )

    @cached_property
    def count(self) -> Grid:
        """Guide tokens that every window reads, per axis."""
        return Grid(
            *(
                min(n, int(w // s) + 2 + 2 * self.margin)
                for n, w, s in zip(self.guide, self.window, self.spacing, strict=True)
            )
        )

    def offsets(self, axis: int, window: Box) -> tuple[float, ...]:
        """Positions, from the window's first token, of the guide tokens that it reads."""
        first = self._first(axis, window)
        positions = self.positions[axis][first : first + self.count[axis]]
        return tuple(p - window.start[axis] for p in positions)

    def box(self, window: Box) -> Box:
        """The guide tokens that a window reads."""
        return Box(Grid(*(self._first(axis, window) for axis in range(3))), self.count)

    def _first(self, axis: int, window: Box) -> int:
        centre = window.start[axis] + (window.size[axis] - 1) / 2
        return _nearest_run(self.positions[axis], self.count[axis], centre)


def _cell_centres(cells: int, length: int) -> tuple[float, ...]:
    return tuple((i + 0.5) * length / cells - 0.5 for i in range(cells))


@lru_cache(maxsize=4096)
def _nearest_run(positions: tuple[float, ...], count: int, centre: float) -> int:
    """First index of the `count` neighbours whose farther end is nearest to `centre`.

    Ties go to the lower index; rounding keeps float noise from deciding them.
    """

    def reach(i: int) -> float:
        return round(max(centre - positions[i], positions[i + count - 1] - centre), 6)

    return min(range(len(positions) - count + 1), key=reach)
