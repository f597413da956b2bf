"""One evaluation of the model: what its blocks and the guide stream share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..device.chunks import ChunkSize, in_chunks
from ..families.family import Family, Modulation, Text
from ..geometry.plan import Plan
from .compiled import Parts
from .memory import MemoryPlan
from .run import SamplingRun
from .settings import DetailSettings


@dataclass(frozen=True)
class Evaluation:
    """One call of the model within a sampling run.

    Args:
        net: the diffusion model as the target sees it: with its LoRA, where it has one.
        base: the diffusion model itself, by which the guide sees it.
        options: the stock transformer options.
        x: the latent [B, C_in, T, H, W], an image's channels behind its own.
        timestep: [B] or [B, T].
        text: of all items.
        parts: of a block, compiled where the artist asks for it.
        chunk: tokens to evaluate at a time.
    """

    net: Any
    base: Any
    family: Family
    settings: DetailSettings
    run: SamplingRun
    options: dict
    x: Tensor
    timestep: Tensor
    text: Text
    parts: Parts
    memory: MemoryPlan
    chunk: ChunkSize

    @property
    def plan(self) -> Plan:
        return self.settings.plan

    @property
    def heads(self) -> int:
        return self.family.heads(self.net)

    @property
    def device(self) -> torch.device:
        return self.x.device


def per_token(ev: Evaluation, block: Any, x: Tensor, rows: Modulation, text: Text) -> None:
    """Cross-attention and feed-forward in place on x [1, n, C], some tokens at a time.

    Nothing here sees another token. Each step adds its result last, so that a chunk that runs out
    of memory can be repeated.

    Args:
        text: of the one item.
    """
    patches = ev.options.get("patches", {}).get("attn2_patch", ())

    def cross(start: int, stop: int) -> None:
        part = x[:, start:stop]
        added = ev.family.cross_attention(block, part, text, ev.options)
        if not patches:
            part.add_(added)
            return
        patched = part + added
        for patch in patches:
            patched = patch({"x": patched, "transformer_options": ev.options})
        part.copy_(patched)

    def forward(start: int, stop: int) -> None:
        part, own = x[:, start:stop], rows.part(start, stop)
        part.addcmul_(ev.parts.feed_forward(block, part, own), own.gate)

    tokens = range(1, x.shape[1] + 1)
    in_chunks(tokens, ev.chunk, cross)
    in_chunks(tokens, ev.chunk, forward)
