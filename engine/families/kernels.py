"""Triton kernels. Their plain counterparts are in `fused`, which alone uses them.

Triton comes with PyTorch for CUDA on Linux; where it is missing, this module cannot be imported.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

WARPS = 4


@triton.jit
def _norm_rotate(
    x, weight, turns, out,
    rows, x_batch, x_row, out_batch, out_row, turns_batch,
    eps,
    width: tl.constexpr, head: tl.constexpr, block: tl.constexpr, norm: tl.constexpr,
):  # fmt: skip
    """One token: its numbers in pairs, normalised over all heads, each pair turned by a matrix."""
    number = tl.program_id(0).to(tl.int64)
    batch, row = number // rows, number % rows
    pair = tl.arange(0, block)
    held = pair < width // 2
    place = 2 * pair[:, None] + tl.arange(0, 2)[None, :]
    both = tl.load(x + batch * x_batch + row * x_row + place, mask=held[:, None], other=0.0)
    numbers = both.to(tl.float32)
    if norm:
        squares = tl.sum(tl.sum(numbers * numbers, axis=1), axis=0)
        scaled = numbers * (1.0 / tl.sqrt(squares / width + eps))
        factors = tl.load(weight + place, mask=held[:, None], other=0.0).to(tl.float32)
        numbers = (scaled * factors).to(both.dtype).to(tl.float32)
    even, odd = tl.split(numbers)
    turn = turns + batch * turns_batch + row * (2 * head) + 4 * (pair % (head // 2))
    first = tl.load(turn, mask=held) * even + tl.load(turn + 1, mask=held) * odd
    second = tl.load(turn + 2, mask=held) * even + tl.load(turn + 3, mask=held) * odd
    turned = tl.join(first, second).to(both.dtype)
    tl.store(out + batch * out_batch + row * out_row + place, turned, mask=held[:, None])


def norm_rotate(
    x: Tensor, weight: Tensor | None, turns: Tensor, out: Tensor, heads: int, eps: float
) -> None:
    """RMSNorm over all channels, then RoPE per head: from x [n, L, C] into out [n, L, C].

    Args:
        x, out: any strides but the last, which is 1.
        weight: of the norm [C], contiguous; None to turn only.
        turns: rotations [1 or n, L, 1, d / 2, 2, 2], contiguous, float32.
    """
    n, rows, width = x.shape
    shared = len(turns) == 1
    launch: Any = _norm_rotate[(n * rows,)]
    launch(
        x,
        turns if weight is None else weight,
        turns,
        out,
        rows,
        x.stride(0),
        x.stride(1),
        out.stride(0),
        out.stride(1),
        0 if shared else turns.stride(0),
        eps,
        width=width,
        head=width // heads,
        block=triton.next_power_of_2(width // 2),
        norm=weight is not None,
        num_warps=WARPS,
    )
