"""The parts of a Wan transformer block, so that they can run on some of the tokens at a time.

The block's own modules are called (never their weights): offloaded, quantised and LoRA-patched
layers work as in the stock forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..comfyui import models
from ..device.chunks import ChunkSize, in_chunks


@dataclass(frozen=True)
class Text:
    """What cross-attention reads: embedded text, image features first where the model has them."""

    tokens: Tensor
    """[B, L, C]"""
    image_tokens: int | None

    def of(self, item: int) -> Text:
        """The text of one batch item."""
        return Text(self.tokens[item : item + 1], self.image_tokens)


@dataclass(frozen=True)
class Modulation:
    """Shift, scale and gate of one block for one batch item, per frame where timesteps differ."""

    rows: tuple[Tensor, ...]
    """Six tensors [1 or frames, C]: shift, scale, gate of attention, then of the feed-forward."""
    frames: Tensor | None = None
    """The frame [n] of each token that this is for, where frames differ."""

    @classmethod
    def of(cls, block: Any, e0: Tensor) -> Modulation:
        """e0 [1 or frames, 6, C], the projected time embedding of one batch item."""
        return cls((models.cast(block.modulation, e0) + e0).unbind(1))

    @property
    def per_frame(self) -> bool:
        return len(self.rows[0]) > 1

    def __getitem__(self, i: int) -> Tensor:
        """Row i: [1, C], or [n, C] for each token; made when it is used, as large as the tokens."""
        return self.rows[i] if self.frames is None else self.rows[i][self.frames]

    def of_tokens(self, frames: Tensor) -> Modulation:
        """For tokens that lie in the given frames [n]."""
        return Modulation(self.rows, frames) if self.per_frame else self

    def part(self, start: int, stop: int) -> Modulation:
        """For tokens start to stop of those that this modulation is for."""
        return self if self.frames is None else Modulation(self.rows, self.frames[start:stop])


def queries(attention: Any, x: Tensor) -> Tensor:
    """Normalised queries [B, L, C], before rotation."""
    return attention.norm_q(attention.q(x))


def keys(attention: Any, x: Tensor) -> Tensor:
    """Normalised keys [B, L, C], before rotation."""
    return attention.norm_k(attention.k(x))


def rotate(x: Tensor, heads: int, freqs: Tensor) -> Tensor:
    """RoPE on [B, L, C] with rotations [1 or B, L, 1, d/2, 2, 2]."""
    return models.apply_rope(x.unflatten(-1, (heads, -1)), freqs).flatten(-2)


def modulated_norm(norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift for a layer norm without weights of its own.

    One row for all tokens goes into the norm as its weight and bias: a single pass over x.
    """
    if len(shift) == 1 and not norm.elementwise_affine:
        return F.layer_norm(x, x.shape[-1:], 1 + scale[0], shift[0], norm.eps)
    return torch.addcmul(shift, norm(x), 1 + scale)


def attention_input(block: Any, x: Tensor, modulation: Modulation) -> Tensor:
    """The modulated, normalised tokens [1, n, C] that self-attention reads."""
    return modulated_norm(block.norm1, x, modulation[0], modulation[1])


def attention_output(block: Any, x: Tensor, attended: Tensor, modulation: Modulation) -> Tensor:
    """x [1, n, C] with the attended values projected, gated and added."""
    return torch.addcmul(x, block.self_attn.o(attended), modulation[2])


def cross_attention(block: Any, x: Tensor, text: Text, options: dict) -> Tensor:
    """What cross-attention adds to tokens x [1, n, C]."""
    return block.cross_attn(
        block.norm3(x), text.tokens, context_img_len=text.image_tokens, transformer_options=options
    )


def feed_forward(block: Any, x: Tensor, modulation: Modulation) -> Tensor:
    """What the feed-forward adds to tokens x [1, n, C], before its gate."""
    return block.ffn(modulated_norm(block.norm2, x, modulation[3], modulation[4]))


@dataclass(frozen=True)
class Parts:
    """The parts of a block that can be exchanged for compiled ones."""

    queries: Callable[..., Tensor] = queries
    keys: Callable[..., Tensor] = keys
    feed_forward: Callable[..., Tensor] = feed_forward


def per_token(
    block: Any,
    x: Tensor,
    modulation: Modulation,
    text: Text,
    options: dict,
    chunk: ChunkSize,
    parts: Parts,
) -> None:
    """Cross-attention and feed-forward in place on x [1, n, C], `chunk` tokens at a time.

    Nothing here sees another token. Each step adds its result last, so that a chunk that runs out
    of memory can be repeated.
    """
    patches = options.get("patches", {}).get("attn2_patch", ())

    def cross(start: int, stop: int) -> None:
        part = x[:, start:stop]
        added = cross_attention(block, part, text, options)
        if not patches:
            part.add_(added)
            return
        patched = part + added
        for patch in patches:
            patched = patch({"x": patched, "transformer_options": options})
        part.copy_(patched)

    def forward(start: int, stop: int) -> None:
        part, rows = x[:, start:stop], modulation.part(start, stop)
        part.addcmul_(parts.feed_forward(block, part, rows), rows[5])

    tokens = range(1, x.shape[1] + 1)
    in_chunks(tokens, chunk, cross)
    in_chunks(tokens, chunk, forward)
