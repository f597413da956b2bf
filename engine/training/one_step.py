"""FlashVSR's one evaluation of its first chunk under autograd, each block computed again.

Of a step only every block's input is kept. Which blocks attend to which is chosen as in use, once
per step: the choice has no gradient, the attention over the chosen blocks has.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..comfyui import management
from ..families import wan
from ..flashvsr.attention import equal_counts, gathered_attention
from ..flashvsr.blocks import TOKENS, BlockGrid
from ..flashvsr.schedule import FIRST_CHUNK, SLOT
from ..flashvsr.selection import Sparsity, pooled
from ..flashvsr.transformer import Evaluation
from .forward import recompute, training_options
from .frozen import frozen_view

GATHERED = 65_536
"""Key tokens that are gathered at a time."""
SLOTS = FIRST_CHUNK // SLOT


class TrainedStep(Evaluation):
    """The clean latent of the first six latent frames, with gradients to the conditioning.

    The transformer's weights get none: they may be offloaded or quantised.
    """

    def __init__(
        self, net: Any, prompt: Tensor, like: Tensor, grid: BlockGrid, sparsity: Sparsity
    ) -> None:
        net.requires_grad_(False)  # ComfyUI 0.18 loads weights that ask for gradients
        with torch.no_grad():
            super().__init__(frozen_view(net), prompt, like, grid, sparsity)
        self.options = training_options()

    def __call__(self, noise: Tensor, conditioning: Tensor) -> Tensor:
        """noise [1, 16, 6, h, w], float32; conditioning [6, h / 2, w / 2, C] -> as the noise."""
        with torch.no_grad():
            embedded = wan.embed(self.net, noise.to(self.like)).view(conditioning.shape)
        tokens = self.grid.to_blocks(embedded + conditioning)
        for block in wan.blocks(self.net):
            choices: dict[int, Tensor] = {}
            tokens = recompute(partial(self._block, block, choices), tokens)
        assert tokens is not None
        return noise - self._velocity(tokens).to(noise)

    def _velocity(self, tokens: Tensor) -> Tensor:
        """Tokens [3 N, 128, C] -> [1, 16, 6, h, w]."""
        frames = [
            wan.head(self.net, frame.flatten(0, 1)[None], self.time, frame.shape[1])
            for frame in self.grid.to_raster(tokens)
        ]
        return torch.stack(frames, dim=1)[None]

    def _block(self, block: Any, choices: dict[int, Tensor], tokens: Tensor) -> Tensor:
        """One block on [3 N, 128, C].

        Args:
            choices: by head; filled in the first pass, kept for the second one, so that rounding
                cannot turn a choice between them.
        """
        management.raise_if_cancelled()
        rows = wan.modulation(block, self.modulation[0])
        x = tokens.flatten(0, 1)[None]
        y = wan.attention_input(block, x, rows)
        slots = [self.rotations.of(first, 0, self.grid.count) for first in range(0, 6, SLOT)]
        rotations = torch.cat(slots, dim=1)
        queries, keys = (
            self.by_head(wan.rotate(part, self.heads, rotations))
            for part in (wan.queries(block, y), wan.keys(block, y))
        )
        values = self.by_head(wan.values(block, y))
        attended = []
        for head, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
            if head not in choices:
                choices[head] = self._choice(q, k)
            attended.append(recomputed_attention(q, k, v, choices[head]))
        x = self.after_attention(block, x, self.to_tokens(torch.stack(attended)), rows)
        return x[0].unflatten(0, (-1, TOKENS))

    @torch.no_grad()
    def _choice(self, q: Tensor, k: Tensor) -> Tensor:
        """Which blocks of one head attend to which: bool [3 N, 3 N]."""
        means = pooled(k)
        return torch.cat([self.chosen(slot, means) for slot in q.chunk(SLOTS)])


def recomputed_attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    """`sparse_attention` with gradients, whose gathered keys are gathered again for them.

    q, k, v [n, 128, d], kept bool [n, n] -> [n, 128, d].
    """
    out = torch.zeros_like(q)
    for rows, columns in equal_counts(kept):
        size = max(1, GATHERED // (columns.shape[1] * TOKENS))
        for some, theirs in zip(rows.split(size), columns.split(size), strict=True):
            attended: Any = recompute(gathered_attention, q[some], k, v, theirs)
            out[some] = attended
    return out
