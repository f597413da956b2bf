"""What an up-scaling costs, known before it begins: tokens, work, memory, disk.

Work is counted in floating point operations, a multiply-add as two, of matrix products,
convolutions and attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..device.budget import size
from ..geometry.shape import BaseShape
from .blocks import SIDE, TOKENS, BlockGrid
from .memory import Sizes
from .projection import IN_FRONT, PATCH
from .schedule import SLOT, Schedule
from .selection import Sparsity
from .tc_decoder import CONDITION_CHANNELS, FRAMES, GROWTH, LATENT_CHANNELS, Widths, held_bytes

PATCH_NUMBERS = 16 * 4
"""Of a latent in one token: 16 channels of 2 x 2."""
FIRST_FRAMES = 21
"""Of the first chunk."""


@dataclass(frozen=True)
class Work:
    """FLOPs of a clip."""

    transformer: float
    """All of it but the attention of tokens to tokens."""
    attention: float
    projection: float
    decoder: float

    @property
    def total(self) -> float:
        return self.transformer + self.attention + self.projection + self.decoder


def transformer_flops(shape: BaseShape, tokens: int, text_tokens: int) -> float:
    """Matrix products of all blocks, attention to the text, both ends."""
    dim = shape.dim
    block = 2 * (6 * dim**2 + 2 * dim * shape.ffn_dim) + 4 * text_tokens * dim
    return tokens * (shape.layers * block + 2 * 2 * PATCH_NUMBERS * dim)


def attention_flops(shape: BaseShape, grid: BlockGrid, schedule: Schedule, s: Sparsity) -> float:
    """Attention of tokens to those of the chosen blocks."""
    near = int(grid.local_mask(s.local_range, torch.device("cpu")).sum())
    pairs, remembered = 0, 0
    for chunk in schedule.chunks():
        seen = remembered + chunk.slots
        most = min(s.budget(grid), near * seen, grid.count**2 * seen - 1)
        pairs += chunk.slots * most
        remembered = seen - s.forgotten(seen)
    return 4 * TOKENS**2 * shape.dim * pairs * shape.layers


def projection_flops(widths: tuple[int, int, int], grid: BlockGrid, token_frames: int) -> float:
    """Two convolutions of 4 x 3 x 3, the first for two frames, and the linear layer."""
    first, second, tokens = widths
    kernel = 4 * 3 * 3
    products = kernel * (IN_FRONT * 3 * PATCH**2 * first + first * second) + second * tokens
    return 2.0 * products * grid.count * SIDE**2 * token_frames


def decoder_flops(widths: Widths, grid: BlockGrid, latent_frames: int) -> float:
    """The Tiny Conditional decoder, level by level; it works on four times as many positions and
    up to twice as many frames at each."""
    positions = grid.count * (2 * SIDE) ** 2
    kernel = 3 * 3
    coarse = widths.coarse
    products = kernel * coarse * (CONDITION_CHANNELS + LATENT_CHANNELS + coarse)
    total = float(products * positions)
    frames = 1
    levels = zip(widths.levels, widths.after, GROWTH, strict=True)
    for width, after, growth in levels:
        total += frames * positions * (3 * 4 * kernel * width**2 + growth * width**2)
        frames *= growth
        positions *= 4
        total += frames * positions * kernel * width * after
    total += frames * positions * kernel * widths.fine * (widths.fine + 3)
    return 2 * total * latent_frames


def decoder_bytes(widths: Widths, grid: BlockGrid, itemsize: int) -> int:
    """What the Tiny Conditional decoder holds at its peak, beside its weights and a stripe."""
    return held_bytes(widths, grid.count * (2 * SIDE) ** 2, itemsize)


@dataclass(frozen=True)
class Need:
    """What an up-scaling takes, in bytes; `work` in FLOPs."""

    frames: int
    size: tuple[int, int]
    """Height and width of the result."""
    tokens: int
    work: Work
    device: int
    decoder: int
    """Of the device too, afterwards."""
    host: int
    disk: int
    order: str

    def lines(self, host_only: bool) -> str:
        """For the artist: two lines."""
        height, width = self.size
        card = max(self.device, self.decoder)
        memory = (
            f"{size(max(self.device + self.host, self.decoder))} of memory"
            if host_only
            else f"{size(card)} of card memory, {size(self.host)} of host memory"
        )
        return (
            f"{width} x {height} x {self.frames}, {self.tokens:,} tokens, "
            f"{self.work.total / 1e12:,.4g} TFLOP, {self.order}\n"
            f"{memory} beside the weights, {size(self.disk)} of temporary disk space"
        )


def latent_bytes(schedule: Schedule, grid: BlockGrid) -> int:
    """The latent's file, float32."""
    return 4 * LATENT_CHANNELS * schedule.latent_frames * grid.count * (2 * SIDE) ** 2


def frame_bytes(frames: int, size: tuple[int, int], bit_depth: int) -> int:
    """The file of decoded frames."""
    height, width = size
    return frames * height * width * 3 * (1 if bit_depth == 8 else 2)


def token_count(schedule: Schedule, grid: BlockGrid) -> int:
    return schedule.latent_frames // SLOT * grid.count * TOKENS


def require_host_memory(need: int, total: int, frames: int) -> None:
    """Raises ValueError where the host has not the memory that a clip takes.

    Args:
        need: bytes that the clip takes.
        total: bytes of the host.
        frames: that it keeps at a time, by `frames_at_a_time`.
    """
    if need > total:
        fewer = f"Up-scale at most {frames} frames at a time, or choose" if frames else "Choose"
        raise ValueError(
            f"This clip at this size takes {size(need)} of the computer's memory, {size(total)} "
            f"are there. {fewer} a smaller size."
        )


def frames_at_a_time(sizes: Sizes, host_free: int) -> int:
    """Frames of the longest clip that is one piece, which keeps no block's keys; 0 for none."""
    more = (host_free // 2 - sizes.piece(1)) // sizes.slot
    return FIRST_FRAMES + SLOT * FRAMES * int(more) if more >= 0 else 0
