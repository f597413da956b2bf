"""Attention of blocks over the key blocks that each has chosen: gathered, no compiled kernel.

Query blocks that chose equally many keys are attended together, so nothing is padded or masked.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device.chunks import ChunkSize, in_chunks


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, chunk: ChunkSize) -> Tensor:
    """One head: q [n, 128, d], k and v [m, 128, d], kept bool [n, m] -> [n, 128, d].

    A query block that keeps no key gives zeros.

    Args:
        chunk: key tokens to gather at a time; halved when they do not fit.
    """
    out = torch.zeros_like(q)
    for rows, columns in equal_counts(kept):
        per_row = columns.shape[1] * k.shape[1]

        def compute(start: int, stop: int, rows: Tensor = rows, columns: Tensor = columns) -> None:
            index = rows[start:stop]
            out[index] = gathered_attention(q[index], k, v, columns[start:stop])

        in_chunks(range(per_row, (len(rows) + 1) * per_row, per_row), chunk, compute)
    return out


def gathered_attention(q: Tensor, k: Tensor, v: Tensor, columns: Tensor) -> Tensor:
    """q [r, 128, d] over the blocks of k and v [m, 128, d] at columns [r, count] -> [r, 128, d]."""
    keys, values = (_gathered(x, columns) for x in (k, v))
    return F.scaled_dot_product_attention(q[None], keys[None], values[None])[0]


def equal_counts(kept: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Query blocks [r] that kept equally many keys, and which [r, count]; none for a count of 0."""
    counts = kept.sum(dim=1)
    order = counts.argsort(stable=True)
    places = kept[order].nonzero()[:, 1]
    sizes, lengths = counts[order].unique_consecutive(return_counts=True)
    row = place = 0
    for size, length in zip(sizes.tolist(), lengths.tolist(), strict=True):
        if size:
            columns = places[place : place + size * length].view(length, size)
            yield order[row : row + length], columns
        row, place = row + length, place + size * length


def _gathered(blocks: Tensor, columns: Tensor) -> Tensor:
    """Blocks [m, 128, d] at columns [r, count] -> [r, count * 128, d].

    A CPU adds up the gradients of `index_select` in one order, those of indexing in any.
    """
    return blocks.index_select(0, columns.flatten()).view(len(columns), -1, blocks.shape[-1])
