"""Sizes of latents, token grids and windows."""

from __future__ import annotations

from typing import NamedTuple


class Grid(NamedTuple):
    """Frames, height and width of a latent, a token grid or a window."""

    frames: int
    height: int
    width: int

    @property
    def count(self) -> int:
        """Number of cells."""
        return self.frames * self.height * self.width

    def clipped(self, outer: Grid) -> Grid:
        """The part of this size that fits into `outer`."""
        return Grid(*(min(a, b) for a, b in zip(self, outer, strict=True)))

    def patches(self, patch: tuple[int, int, int]) -> Grid:
        """Size in patches; a partial patch counts, as the model pads it."""
        return Grid(*(-(-a // p) for a, p in zip(self, patch, strict=True)))

    def __str__(self) -> str:
        return " x ".join(map(str, self))
