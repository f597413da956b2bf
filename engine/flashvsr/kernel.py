"""A compiled kernel for chosen blocks, where PyTorch has one for the card: used once it agrees.

FlexAttention is a part of PyTorch; it needs Triton to compile. Everything works without it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ..comfyui import management
from ..device.chunks import ChunkSize
from ..log import log
from .attention import sparse_attention
from .blocks import TOKENS

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, ChunkSize], Tensor]
AGREEMENT = 2e-2
"""Largest difference that rounding to half precision explains, of values of unit size."""


def block_sparse_attention(flex: Callable) -> Attention:
    """`sparse_attention` by a FlexAttention function, compiled or not."""
    from torch.nn.attention.flex_attention import BlockMask

    # What a backward pass would read takes two sorts of the whole choice; older PyTorch makes it.
    known = signature(BlockMask.from_kv_blocks).parameters
    forward_only: dict[str, Any] = (
        {"compute_q_blocks": False} if "compute_q_blocks" in known else {}
    )

    def attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, chunk: ChunkSize) -> Tensor:
        counts = kept.sum(dim=1, dtype=torch.int32)
        order = kept.int().argsort(dim=1, descending=True, stable=True).int()
        none = torch.zeros_like(counts)[None, None]
        mask = BlockMask.from_kv_blocks(
            none,  # blocks of which only a part is read
            order[None, None],
            counts[None, None],
            order[None, None],
            BLOCK_SIZE=TOKENS,
            **forward_only,
            mask_mod=lambda batch, head, query, key: kept[query // TOKENS, key // TOKENS],
        )
        flat = (x.reshape(1, 1, -1, x.shape[-1]) for x in (q, k, v))
        out = flex(*flat, block_mask=mask)[0, 0].view_as(q)
        return torch.where(counts[:, None, None] > 0, out, 0)  # a row without keys gives zeros

    return attend


@cache
def attention_for(device: torch.device, dtype: torch.dtype) -> Attention:
    """The fastest attention over chosen blocks that is known to be right on a device."""
    if device.type != "cuda" or dtype == torch.float32:
        return sparse_attention
    try:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = block_sparse_attention(torch.compile(flex_attention, dynamic=True))
        difference = disagreement(compiled, device, dtype)
    except Exception as error:  # whatever a compiler may raise: the gathered attention always works
        if management.is_out_of_memory(error):
            raise
        log.info("AtlasVid: FlashVSR attends without a compiled kernel (%s)", type(error).__name__)
        return sparse_attention
    if difference > AGREEMENT:
        log.warning("AtlasVid: FlexAttention is wrong by %.3g here and is not used", difference)
        return sparse_attention
    return guarded(compiled)


def guarded(attend: Attention) -> Attention:
    """A compiled attention; the gathered one from its first failure on, as of a later compiling."""
    works = True

    def attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, chunk: ChunkSize) -> Tensor:
        nonlocal works
        if works:
            try:
                return attend(q, k, v, kept, chunk)
            except Exception as error:
                if management.is_out_of_memory(error) or management.is_cancelled(error):
                    raise
                log.warning(
                    "AtlasVid: FlexAttention failed (%s); going on without", type(error).__name__
                )
                works = False
        return sparse_attention(q, k, v, kept, chunk)

    return attention


def disagreement(attend: Attention, device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference of an attention to the gathered one, on random blocks."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(3, 24, TOKENS, 128, generator=generator).to(device, dtype)
    kept = (torch.rand(8, 24, generator=generator) < 0.4).to(device)
    kept[3] = False
    chunk = ChunkSize(2**30)
    q, k, v = blocks[0, :8], blocks[1], blocks[2]
    theirs, ours = attend(q, k, v, kept, chunk), sparse_attention(q, k, v, kept, chunk)
    return float((theirs.float() - ours.float()).abs().max())
