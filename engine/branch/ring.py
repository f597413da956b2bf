"""Keys and values that sliding windows read, a key window's length of them at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..device.tokens import Tokens
from ..geometry.grid import Grid


class Ring:
    """Rotated keys and values of the last slices along the streamed axis, the guide's behind them.

    Shared by all blocks and batch items of a forward, which fill it one after the other. A window's
    keys and values and those that it reads of the guide lie in one tensor: one gather joins them.

    Args:
        grid: the target's tokens, with the streamed axis cut to a key window's length.
        tokens: [grid.count + guide tokens, 2 C], each a key and its value.
    """

    def __init__(self, grid: Grid, tokens: Tokens):
        self.grid = grid
        self.tokens = tokens

    @property
    def index_device(self) -> torch.device:
        return self.tokens.index_device

    @property
    def guide_start(self) -> int:
        """The slot of the guide's first token."""
        return self.grid.count

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [n, C] into slots [n]; visible to reads after `settle`."""
        self.tokens.write(slots, keys)
        self.tokens.write(slots, values, keys.shape[1])

    def settle(self) -> None:
        self.tokens.settle()

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [windows, n, C] in slots [windows, n], on the computing device."""
        both = self.tokens.read(slots.flatten()).unflatten(0, slots.shape)
        keys, values = both.chunk(2, dim=-1)
        return keys, values
