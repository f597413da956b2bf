"""One block on one batch item: what every way of cutting the grid into windows shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..comfyui import models
from ..device import copies
from ..device.tokens import Tokens
from ..families.family import Modulation, Text
from ..geometry.grid import Grid
from .evaluation import Evaluation, per_token
from .ring import Ring
from .sparsity import keep_blocks
from .weighted import Pair, weighted_attention


@dataclass(frozen=True)
class BlockTask:
    """A block and the target tokens of one batch item, which it updates in place.

    Args:
        tokens: of the item, in raster order.
        text: of the item.
        guide: unrotated keys and values of the guide [L_g, C], or None.
        ring: what sliding windows need.
    """

    ev: Evaluation
    block: Any
    tokens: Tokens
    modulation: Modulation
    text: Text
    guide: Pair | None
    ring: Ring | None = None

    def read(self, index: Tensor) -> tuple[Tensor, Modulation]:
        """Tokens [1, n, C] at raster indices [n], and their modulation."""
        return self.tokens.read(index)[None], self.modulation_of(index)

    def modulation_of(self, index: Tensor) -> Modulation:
        """The modulation of tokens at raster indices [n]."""
        if not self.modulation.per_frame:
            return self.modulation
        grid = self.ev.plan.tokens
        frames = index // (grid.height * grid.width)
        return self.modulation.of_tokens(copies.index_on(frames, self.ev.device))

    def attend(self, q: Tensor, keys: WindowKeys, size: Grid) -> Tensor:
        """Attention of windows of `size`: one softmax over their keys and their guide's keys.

        Args:
            q: [n, L, C].

        Returns:
            [1, n * L, C].
        """
        settings, options, heads = self.ev.settings, self.ev.options, self.ev.heads
        if settings.keep_blocks:
            kept = keep_blocks(q, keys.own, heads, size, settings.keep_blocks)
            keys = WindowKeys(kept, keys.guide)
        patches = options.get("patches", {}).get("attn1_patch", ())
        if keys.guide is not None and settings.guide_weight != 1:
            out = weighted_attention(q, keys.own, keys.guide, heads, settings.guide_weight)
        else:
            keys = WindowKeys(keys.own, keys.guide, keys.joined())
            out = models.attention(q, *keys.joined(), heads, options)
        for patch in patches:
            read = {"x": out, "q": q, "k": keys.joined()[0], "transformer_options": options}
            out = patch(read)
        return out.reshape(1, -1, out.shape[-1])

    def finish(self, x: Tensor, attended: Tensor, rows: Modulation, index: Tensor) -> None:
        """The rest of the block for tokens x [1, n, C] at `index`, written back at the end."""
        x = self.ev.family.attention_output(self.block, x, attended, rows)
        del attended
        per_token(self.ev, self.block, x, rows, self.text)
        self.tokens.write(index, x[0])


@dataclass(frozen=True)
class WindowKeys:
    """Keys and values that windows read.

    Args:
        own: of the windows, [n, size.count, C] in raster order.
        guide: of the guide, [n, K, C], always read whole; or None.
        together: both side by side, where they are in memory.
    """

    own: Pair
    guide: Pair | None
    together: Pair | None = None

    @classmethod
    def split(cls, together: Pair, own: int) -> WindowKeys:
        """The first `own` keys are the windows', the others the guide's."""
        keys, values = together
        guide = (keys[:, own:], values[:, own:]) if keys.shape[1] > own else None
        return cls((keys[:, :own], values[:, :own]), guide, together)

    def joined(self) -> Pair:
        """Side by side [n, size.count + K, C]."""
        if self.together is not None:
            return self.together
        if self.guide is None:
            return self.own
        keys, values = (torch.cat(each, dim=1) for each in zip(self.own, self.guide, strict=True))
        return keys, values


class WindowAttention(Protocol):
    """A way of cutting the grid into windows. Lives for a sampling run."""

    def evaluate(self, task: BlockTask, index: int) -> None:
        """Evaluate block number `index` in place on the task's tokens."""
        ...
