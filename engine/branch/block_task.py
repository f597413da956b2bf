"""One block on one batch item: what every way of cutting the grid into windows shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..comfyui import models
from ..device import copies
from ..device.chunks import ChunkSize
from ..device.tokens import Tokens
from ..families import wan
from ..geometry.grid import Grid
from .ring import Ring
from .sparsity import keep_blocks
from .weighted import weighted_attention


@dataclass(frozen=True)
class BlockTask:
    """A block and the target tokens of one batch item, which it updates in place.

    Args:
        tokens: of the item, in raster order.
        grid: F, h, w.
        guide: unrotated keys and values of the guide [L_g, C], or None.
        chunk: tokens to evaluate at a time.
        ring: what sliding windows need.
        guide_weight: how often each of the guide's keys counts, above 0.
    """

    block: Any
    tokens: Tokens
    grid: Grid
    modulation: wan.Modulation
    text: wan.Text
    guide: tuple[Tensor, Tensor] | None
    heads: int
    options: dict
    chunk: ChunkSize
    device: torch.device
    keep_blocks: int = 0
    parts: wan.Parts = field(default_factory=wan.Parts)
    ring: Ring | None = None
    guide_weight: float = 1.0

    def read(self, index: Tensor) -> tuple[Tensor, wan.Modulation]:
        """Tokens [1, n, C] at raster indices [n], and their modulation."""
        return self.tokens.read(index)[None], self.modulation_of(index)

    def modulation_of(self, index: Tensor) -> wan.Modulation:
        """The modulation of tokens at raster indices [n]."""
        if not self.modulation.per_frame:
            return self.modulation
        frames = index // (self.grid.height * self.grid.width)
        return self.modulation.of_tokens(copies.index_on(frames, self.device))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, size: Grid, guide: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Attention of windows: one softmax over a window's keys and its aligned guide keys.

        Args:
            q: [n, L, C].
            k, v: of windows of `size`, [n, size.count, C] in raster order.
            guide: keys and values [n, K, C], always read whole.

        Returns:
            [1, n * L, C].
        """
        if self.keep_blocks:
            k, v = keep_blocks(q, k, v, self.heads, size, self.keep_blocks)
        patches = self.options.get("patches", {}).get("attn1_patch", ())
        if guide is not None and self.guide_weight != 1:
            out = weighted_attention(q, k, v, guide, self.heads, self.guide_weight)
            if patches:
                k = torch.cat([k, guide[0]], dim=1)
        else:
            if guide is not None:
                k, v = torch.cat([k, guide[0]], dim=1), torch.cat([v, guide[1]], dim=1)
            out = models.attention(q, k, v, self.heads, self.options)
        for patch in patches:
            out = patch({"x": out, "q": q, "k": k, "transformer_options": self.options})
        return out.reshape(1, -1, out.shape[-1])

    def finish(
        self, x: Tensor, attended: Tensor, modulation: wan.Modulation, index: Tensor
    ) -> None:
        """The rest of the block for tokens x [1, n, C] at `index`, written back at the end."""
        x = wan.attention_output(self.block, x, attended, modulation)
        del attended
        wan.per_token(self.block, x, modulation, self.text, self.options, self.chunk, self.parts)
        self.tokens.write(index, x[0])


class WindowAttention(Protocol):
    """A way of cutting the grid into windows. Lives for a sampling run."""

    def evaluate(self, task: BlockTask, index: int) -> None:
        """Evaluate block number `index` in place on the task's tokens."""
        ...
