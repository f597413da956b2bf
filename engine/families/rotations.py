"""Rotations of windows and guide tokens from per-axis positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..geometry.grid import Grid


@dataclass(frozen=True)
class RopeAxes:
    """Rotations from per-axis positions, under the model's embedder and stock `rope_options`.

    Args:
        embedder: the model's `rope_embedder`, or what a node put in its place.
        options: the stock `rope_options` (scale_t, shift_t, ...), empty when not set.
    """

    embedder: Any
    options: Mapping[str, float]

    def table(self, axis: int, positions: Tensor) -> Tensor:
        """Rotations of one axis for positions [n] -> [n, axes_dim[axis] / 2, 2, 2]."""
        name = "tyx"[axis]
        scale, shift = (
            self.options.get(f"scale_{name}", 1.0),
            self.options.get(f"shift_{name}", 0.0),
        )
        ids = (positions.float() * scale + shift)[None, :, None].expand(1, -1, 3)
        first = sum(self.embedder.axes_dim[:axis]) // 2
        last = first + self.embedder.axes_dim[axis] // 2
        return self.embedder(ids)[0, 0, :, first:last]

    def box(self, size: Grid, device: torch.device) -> Tensor:
        """Rotations of a box at positions 0, 1, 2, ... -> [1, tokens, 1, d/2, 2, 2]."""
        positions = [torch.arange(n, device=device)[None] for n in size]
        return join_axes([self.tables(axis, p) for axis, p in enumerate(positions)])

    def tables(self, axis: int, positions: Tensor) -> Tensor:
        """Rotations of one axis for several boxes: [boxes, n] -> [boxes, n, d_axis/2, 2, 2]."""
        return self.table(axis, positions.flatten()).unflatten(0, positions.shape)


def join_axes(tables: Sequence[Tensor]) -> Tensor:
    """Rotations of boxes from those of their axes, each [boxes, n, d_axis/2, 2, 2].

    -> [boxes, frames * height * width, 1, d/2, 2, 2] in raster order.
    """
    time, height, width = tables
    f, y, x = (t.shape[1] for t in tables)
    joined = torch.cat(
        [
            time[:, :, None, None].expand(-1, -1, y, x, -1, -1, -1),
            height[:, None, :, None].expand(-1, f, -1, x, -1, -1, -1),
            width[:, None, None].expand(-1, f, y, -1, -1, -1, -1),
        ],
        dim=4,
    )
    return rearrange(joined, "n f y x d i j -> n (f y x) 1 d i j")
