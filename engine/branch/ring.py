"""Keys and values that sliding windows read, a key window's length of them at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..device.tokens import Tokens
from ..geometry.grid import Grid


class Ring:
    """Rotated keys and values of the last slices along the streamed axis.

    Shared by all blocks and batch items of a forward, which fill it one after the other.

    Args:
        grid: the target's tokens, with the streamed axis cut to a key window's length.
        keys, values: [grid.count, C], both on the device that computes or both in host memory.
    """

    def __init__(self, grid: Grid, keys: Tokens, values: Tokens):
        self.grid = grid
        self.keys = keys
        self.values = values
        self.filled = 0
        """Slices of the grid made so far, of the block being evaluated."""

    @property
    def index_device(self) -> torch.device:
        return self.keys.index_device

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [n, C] into slots [n]; visible to reads after `settle`."""
        self.keys.write(slots, keys)
        self.values.write(slots, values)

    def settle(self) -> None:
        self.keys.settle()
        self.values.settle()

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [windows, n, C] in slots [windows, n], on the computing device."""
        flat = slots.flatten()
        keys, values = self.keys.read(flat), self.values.read(flat)
        return keys.view(*slots.shape, -1), values.view(*slots.shape, -1)
