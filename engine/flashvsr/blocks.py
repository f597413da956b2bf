"""Blocks of 2 x 8 x 8 tokens: the unit of FlashVSR's sparse attention.

Tokens are kept in block order, (slot, block row, block column, frame, row, column), so that a block
is a run of tokens and a stripe of block rows a run of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from .schedule import SLOT

SIDE = 8
"""Tokens along a side of a block."""
TOKENS = SLOT * SIDE * SIDE
PIXELS = 128
"""Pixels along a side of a block."""


@dataclass(frozen=True)
class BlockGrid:
    """The blocks of one slot: `rows` x `columns`."""

    rows: int
    columns: int

    @classmethod
    def of(cls, height: int, width: int) -> BlockGrid:
        """The grid of a picture whose sides are multiples of 128 pixels.

        Raises:
            ValueError: they are not.
        """
        if height % PIXELS or width % PIXELS or not height or not width:
            raise ValueError(f"{width} x {height} pixels are no multiples of {PIXELS}.")
        return cls(height // PIXELS, width // PIXELS)

    @property
    def count(self) -> int:
        return self.rows * self.columns

    def local_mask(self, local_range: int, device: torch.device) -> Tensor:
        """Which key blocks [N, N] of a slot a query block may choose: those around it.

        A range cut, not shifted, at the borders; for an odd one the block stands in its middle.
        """
        rows = _near(self.rows, local_range, device)
        columns = _near(self.columns, local_range, device)
        near = rows[:, None, :, None] & columns[None, :, None, :]
        return near.reshape(self.count, self.count)

    def to_blocks(self, tokens: Tensor) -> Tensor:
        """Tokens [slots * 2, rows * 8, columns * 8, C] -> [slots * N, 128, C]."""
        return rearrange(
            tokens,
            "(s f) (i y) (j x) c -> (s i j) (f y x) c",
            f=SLOT,
            y=SIDE,
            x=SIDE,
        )

    def to_raster(self, blocks: Tensor) -> Tensor:
        """Tokens [slots * N, 128, C] -> [slots * 2, rows * 8, columns * 8, C]."""
        return rearrange(
            blocks,
            "(s i j) (f y x) c -> (s f) (i y) (j x) c",
            i=self.rows,
            j=self.columns,
            f=SLOT,
            y=SIDE,
            x=SIDE,
        )


def _near(count: int, local_range: int, device: torch.device) -> Tensor:
    """Whether place [n, m] of a key lies in the range of a query's place."""
    places = torch.arange(count, device=device)
    first = places[:, None] - local_range // 2
    return (places >= first) & (places < first + local_range)
