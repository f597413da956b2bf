"""Which key blocks a query block attends to (FlashVSR's locality-constrained sparse attention)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .blocks import PIXELS, BlockGrid


@dataclass(frozen=True)
class Sparsity:
    """How much is attended to.

    Args:
        sparse_ratio: key blocks per query block, in units of 60.
        kv_ratio: slots that are remembered.
        local_range: blocks along a side of the neighbourhood that may be chosen from.
    """

    sparse_ratio: float = 2.0
    kv_ratio: float = 3.0
    local_range: int = 11

    def budget(self, grid: BlockGrid) -> int:
        """Key blocks that all query blocks of a slot and head may keep together, less one."""
        pixels = grid.rows * PIXELS * (grid.columns * PIXELS)
        share = self.sparse_ratio * 768 * 1280 / pixels
        return max(0, int(grid.count * grid.count * share) - 1)

    def forgotten(self, slots: int) -> int:
        """How many of `slots` remembered slots are dropped, oldest first: one at most."""
        return int(slots > int(self.kv_ratio))

    @property
    def most_slots(self) -> int:
        """Slots of keys that a chunk may see."""
        return max(3, int(self.kv_ratio), 2) + 1


PUBLISHED = Sparsity()


def pooled(rows: Tensor) -> Tensor:
    """The mean of every block's tokens: [blocks, 128, d] -> [blocks, d]."""
    return rows.mean(dim=1)


def chosen(queries: Tensor, keys: Tensor, near: Tensor, budget: int) -> Tensor:
    """Which key blocks each query block of one slot and one head attends to.

    The softmax of scores among blocks in range; then one threshold for the whole slot, its
    (budget + 1)-th largest entry. What is strictly greater is kept, so that entries that tie with
    it are not, and a query block may be left without any.

    Args:
        queries, keys: pooled, [N, d] and [slots * N, d].
        near: blocks of a slot in range, [N, N].
        budget: entries to keep.

    Returns:
        bool [N, slots * N].
    """
    scores = (queries @ keys.T) / math.sqrt(queries.shape[-1])
    slots = keys.shape[0] // queries.shape[0]
    scores = scores.float().masked_fill(~near.repeat(1, slots), -math.inf)
    share = scores.softmax(dim=-1)
    flat = share.flatten()
    rank = min(flat.numel() - 1, budget)
    threshold = flat.topk(rank + 1).values[-1]
    return share > threshold
