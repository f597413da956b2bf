"""RoPE of blocks at positions without bound."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..device import copies
from ..families.rotations import join_axes
from .blocks import SIDE, BlockGrid
from .schedule import SLOT


class BlockRotations:
    """Rotations of a grid's blocks, from angles in float64.

    Stock builds positions in the model's dtype, which in bf16 knows no integers above 256.

    Args:
        embedder: the model's `rope_embedder`, for theta and the split of a head's width.
    """

    def __init__(self, embedder: Any, grid: BlockGrid, device: torch.device) -> None:
        self._grid = grid
        self._device = device
        self._theta = embedder.theta
        self._time_width, *sides = embedder.axes_dim
        self._rows, self._columns = (
            self._table(torch.arange(count * SIDE), width).unflatten(0, (count, SIDE))
            for count, width in zip((grid.rows, grid.columns), sides, strict=True)
        )
        self._times: dict[int, Tensor] = {}
        """Of slots, by their first frame."""

    def of(self, first: int, start: int, stop: int) -> Tensor:
        """Of blocks start <= n < stop of the slot of latent frames `first` and the one after it.

        -> [1, (stop - start) * 128, 1, d / 2, 2, 2], float32.
        """
        place = torch.arange(start, stop, device=self._device)
        if first not in self._times:
            self._times[first] = self._table(torch.arange(first, first + SLOT), self._time_width)
        time = self._times[first]
        rotations = join_axes(
            (
                time.expand(len(place), *time.shape),
                self._rows[place // self._grid.columns],
                self._columns[place % self._grid.columns],
            )
        )
        return rotations.flatten(0, 1)[None]

    def _table(self, positions: Tensor, width: int) -> Tensor:
        """Positions [n] -> [n, width / 2, 2, 2]."""
        powers = torch.arange(0, width, 2, dtype=torch.float64) / width
        angles = positions.double()[:, None] * self._theta**-powers
        cos, sin = angles.cos(), angles.sin()
        table = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))
        pinned = copies.host_buffer(tuple(table.shape), torch.float32, self._device)
        return copies.upload(pinned.copy_(table), self._device)
