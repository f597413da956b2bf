"""Top-k block sparsity: a window reads only those blocks of its keys that matter most to it.

After FlashVSR (arXiv 2510.12747), but coarser: keys are pooled by block, queries over the whole
window, so that all tokens of a window read the same blocks. FlashVSR's own rule, a choice for every
block of queries under one threshold, is `engine/flashvsr/selection.py`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..geometry.grid import Grid
from ..geometry.windows import ShiftedWindows, flat_index
from .weighted import Pair

BLOCK = Grid(2, 8, 8)
"""128 tokens, FlashVSR's block."""


@lru_cache(maxsize=64)
def block_order(size: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Raster indices of a window's tokens: of whole blocks [n, 128], and of the rest [m].

    Blocks at a border that are cut off count as rest: they are always read.
    """
    boxes = ShiftedWindows(size, BLOCK.clipped(size)).by_size(0)
    whole = boxes.pop(BLOCK.clipped(size))
    order = flat_index(size, torch.tensor([box.start for box in whole]), BLOCK.clipped(size))
    rest = sorted(set(range(size.count)) - set(order.flatten().tolist()))
    return order.to(device), torch.tensor(rest, dtype=torch.long).to(device)


def keep_blocks(q: Tensor, own: Pair, heads: int, size: Grid, kept: int) -> Pair:
    """The keys and values of the `kept` best blocks per window and head, and of cut-off blocks.

    Args:
        q: rotated queries [n, L, C].
        own: rotated keys and values of windows of `size`, in raster order [n, size.count, C].
        kept: whole blocks that every head of a window reads.

    Returns:
        k, v [n, K', C]; each head's channels come from the blocks that it chose.
    """
    order, rest = block_order(size, q.device)
    blocks, length = order.shape
    if kept >= blocks:
        return own
    k, v = own
    k_blocks = k[:, order].unflatten(-1, (heads, -1))  # [n, blocks, 128, heads, d]
    v_blocks = v[:, order].unflatten(-1, (heads, -1))
    pooled_q = q.unflatten(-1, (heads, -1)).mean(1)
    score = torch.einsum("nhd,nbhd->nbh", pooled_q.float(), k_blocks.mean(2).float())
    best = score.topk(kept, dim=1).indices.sort(dim=1).values
    index = best[:, :, None, :, None].expand(-1, -1, length, -1, k_blocks.shape[-1])

    def gathered(from_blocks: Tensor, whole: Tensor) -> Tensor:
        chosen = from_blocks.gather(1, index).flatten(1, 2).flatten(-2)
        return torch.cat([chosen, whole[:, rest]], dim=1)

    return gathered(k_blocks, k), gathered(v_blocks, v)
