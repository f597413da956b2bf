"""The Wan transformers: what `families.family` asks of a family.

A block's parts run on some of the tokens at a time. The block's own modules are called (never their
weights): offloaded, quantised and LoRA-patched layers work as in the stock forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..comfyui import models
from ..geometry.shape import BaseShape
from ..geometry.space import LatentSpace
from .fused import linear_gelu, norm_rotate
from .rotations import RopeAxes

NAMES: str = "Wan 2.1 T2V, Wan 2.1 I2V, Wan 2.2 A14B (high and low noise), Wan 2.2 TI2V-5B"
TIMESTEPS: float = 1000.0
"""The timestep is 1000 sigma."""
TEXT_WIDTH = 4096
"""Of UMT5's embeddings."""


# --- The model -------------------------------------------------------------------------------


def recognises(model: Any) -> bool:
    """Whether a loaded model is a plain Wan (VACE, Animate, ... have other blocks)."""
    return models.is_plain_wan(model)


def latent_space(model: Any) -> LatentSpace:
    """The latent space of a loaded model."""
    latent_format = model.get_model_object("latent_format")
    return LatentSpace(
        channels=latent_format.latent_channels,
        spatial=latent_format.spacial_downscale_ratio,
        temporal=getattr(latent_format, "temporal_downscale_ratio", 4),
        patch=tuple(model.model.diffusion_model.patch_size),
    )


def shape(net: Any) -> BaseShape:
    """The sizes of a WanModel."""
    return BaseShape(net.dim, net.ffn_dim, len(net.blocks), net.in_dim)


def heads(net: Any) -> int:
    return net.num_heads


def blocks(net: Any) -> Sequence[Any]:
    return net.blocks


def rotations(net: Any, options: Mapping[str, float]) -> RopeAxes:
    """Rotations under the model's embedder and the stock `rope_options`."""
    return RopeAxes(net.rope_embedder, options)


# --- Around the blocks -----------------------------------------------------------------------


@dataclass(frozen=True)
class Conditioning:
    """What the forward is given beside latent and timestep."""

    context: Tensor
    clip_fea: Tensor | None
    options: dict
    unknown: tuple[str, ...]
    """Kinds of conditioning that the detail branch does not compute with."""

    def require_known(self) -> None:
        """Raises ValueError where there is a kind that the detail branch does not know."""
        if self.unknown:
            raise ValueError(
                f"The detail branch does not know the conditioning {', '.join(self.unknown)}. Use "
                "plain text or WanImageToVideo conditioning, or give that conditioning to the "
                "proxy only."
            )


def conditioning(context: Tensor, args: tuple, kwargs: dict) -> Conditioning:
    """From the arguments of `WanModel.forward` after the timestep."""
    names = ("clip_fea", "time_dim_concat", "transformer_options")
    given = {**kwargs, **dict(zip(names, args, strict=False))}
    unknown = ("reference_latent", "context_latents", "time_dim_concat")
    return Conditioning(
        context,
        given.get("clip_fea"),
        given.get("transformer_options", {}),
        tuple(name for name in unknown if given.get(name) is not None),
    )


@dataclass(frozen=True)
class Text:
    """What cross-attention reads: embedded text, image features first where the model has them."""

    tokens: Tensor
    """[B, L, C]"""
    image_tokens: int | None
    keys: tuple[tuple[Tensor, Tensor], ...] = ()
    """Of one block: keys and values [B, L, C] of the text, then of the image; empty where the
    block makes them itself."""

    def of(self, item: int) -> Text:
        """The text of one batch item."""
        return Text(self.tokens[item : item + 1], self.image_tokens)

    def with_tokens(self, tokens: Tensor) -> Text:
        return Text(tokens, self.image_tokens)


def text(net: Any, given: Conditioning) -> Text:
    """The embedded text."""
    tokens = net.text_embedding(given.context)
    if given.clip_fea is None:
        return Text(tokens, None)
    if net.img_emb is not None:
        tokens = torch.cat([net.img_emb(given.clip_fea), tokens], dim=1)
    return Text(tokens, given.clip_fea.shape[-2])


def time_embedding(net: Any, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The time embedding, which the head reads, and its projection, which the blocks read.

    timestep [B] or [B, frames] -> e [B, 1 or frames, C], e0 [B, 1 or frames, 6, C].
    """
    waves = models.time_waves(timestep.flatten(), net.freq_dim)
    e = net.time_embedding(waves.to(dtype))
    e = e.reshape(timestep.shape[0], -1, e.shape[-1])
    return e, net.time_projection(e).unflatten(2, (6, net.dim))


def embed(net: Any, latent: Tensor) -> Tensor:
    """Latent [B, C_in, T, H, W] of whole patches -> tokens [B, L, C] in raster order."""
    return net.patch_embedding(latent.float()).to(latent.dtype).flatten(2).transpose(1, 2)


def head(net: Any, tokens: Tensor, e: Tensor, width: int) -> Tensor:
    """The output latent of rows of one frame.

    Args:
        tokens: [1, rows * width, C].
        e: the frame's time embedding [1, 1, C].
        width: tokens in a row.

    Returns:
        [C_out, rows * patch height, width * patch width].
    """
    _, ph, pw = net.patch_size
    patches = net.head(tokens, e).view(-1, width, ph, pw, net.out_dim).permute(4, 0, 2, 1, 3)
    return patches.reshape(net.out_dim, patches.shape[1] * ph, width * pw)


# --- A block ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Modulation:
    """Shift, scale and gate of one block for one batch item, per frame where timesteps differ."""

    rows: tuple[Tensor, ...]
    """Six tensors [1 or frames, C]: shift, factor, gate of attention, then of the feed-forward. A
    factor is 1 + the checkpoint's scale."""
    frames: Tensor | None = None
    """The frame [n] of each token that this is for, where frames differ."""

    @property
    def per_frame(self) -> bool:
        return len(self.rows[0]) > 1

    @property
    def gate(self) -> Tensor:
        """The feed-forward's [1 or n, C]."""
        return self[5]

    def __getitem__(self, i: int) -> Tensor:
        """Row i: [1, C], or [n, C] for each token; made when it is used, as large as the tokens."""
        return self.rows[i] if self.frames is None else self.rows[i][self.frames]

    def of_tokens(self, frames: Tensor) -> Modulation:
        """For tokens that lie in the given frames [n]."""
        return Modulation(self.rows, frames) if self.per_frame else self

    def part(self, start: int, stop: int) -> Modulation:
        """For tokens start to stop of those that this modulation is for."""
        return self if self.frames is None else Modulation(self.rows, self.frames[start:stop])


def modulation(block: Any, e0: Tensor) -> Modulation:
    """e0 [1 or frames, 6, C], the projected time embedding of one batch item."""
    rows = list((models.cast(block.modulation, e0) + e0).unbind(1))
    rows[1], rows[4] = 1 + rows[1], 1 + rows[4]
    return Modulation(tuple(rows))


def queries(block: Any, y: Tensor) -> Tensor:
    """Normalised queries [B, L, C] of an attention's input, before rotation."""
    return block.self_attn.norm_q(block.self_attn.q(y))


def keys(block: Any, y: Tensor) -> Tensor:
    """Normalised keys [B, L, C] of an attention's input, before rotation."""
    return block.self_attn.norm_k(block.self_attn.k(y))


def values(block: Any, y: Tensor) -> Tensor:
    """Values [B, L, C] of an attention's input."""
    return block.self_attn.v(y)


def rotate(x: Tensor, heads: int, freqs: Tensor, out: Tensor | None = None) -> Tensor:
    """RoPE on [B, L, C] with rotations [1 or B, L, 1, d/2, 2, 2].

    Args:
        out: where to write the result.
    """
    return norm_rotate(None, x, heads, freqs, out)


def projected_queries(block: Any, y: Tensor) -> Tensor:
    """What `turned_queries` takes [B, L, C], of an attention's input."""
    return block.self_attn.q(y)


def projected_keys(block: Any, y: Tensor) -> Tensor:
    """What `turned_keys` takes [B, L, C], of an attention's input."""
    return block.self_attn.k(y)


def turned_queries(block: Any, x: Tensor, heads: int, freqs: Tensor) -> Tensor:
    """Normalised, rotated queries [B, L, C]."""
    return norm_rotate(block.self_attn.norm_q, x, heads, freqs)


def turned_keys(
    block: Any, x: Tensor, heads: int, freqs: Tensor, out: Tensor | None = None
) -> Tensor:
    """Normalised, rotated keys [B, L, C], written into `out` where it is given."""
    return norm_rotate(block.self_attn.norm_k, x, heads, freqs, out)


def modulated_norm(norm: Any, x: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
    """norm(x) * factor + shift for a layer norm without weights of its own.

    One row for all tokens goes into the norm as its weight and bias: a single pass over x.
    """
    if len(shift) == 1 and not norm.elementwise_affine:
        return F.layer_norm(x, x.shape[-1:], factor[0], shift[0], norm.eps)
    return torch.addcmul(shift, norm(x), factor)


def attention_input(block: Any, x: Tensor, rows: Modulation) -> Tensor:
    """The modulated, normalised tokens [1, n, C] that self-attention reads."""
    return modulated_norm(block.norm1, x, rows[0], rows[1])


def attention_output(block: Any, x: Tensor, attended: Tensor, rows: Modulation) -> Tensor:
    """x [1, n, C] with the attended values projected, gated and added."""
    return torch.addcmul(x, block.self_attn.o(attended), rows[2])


def text_of_block(block: Any, text: Text) -> Text:
    """The text with a block's keys and values of it, which are the same for all tokens."""
    layer = block.cross_attn
    if not models.is_plain_cross_attention(layer):
        return text
    if not hasattr(layer, "k_img"):
        return replace(text, keys=((layer.norm_k(layer.k(text.tokens)), layer.v(text.tokens)),))
    image, words = text.tokens[:, : text.image_tokens], text.tokens[:, text.image_tokens :]
    of_words = layer.norm_k(layer.k(words)), layer.v(words)
    of_image = layer.norm_k_img(layer.k_img(image)), layer.v_img(image)
    return replace(text, keys=(of_words, of_image))


def cross_attention(block: Any, x: Tensor, text: Text, options: dict) -> Tensor:
    """What cross-attention adds to tokens x [1, n, C]."""
    layer, y = block.cross_attn, block.norm3(x)
    if not text.keys:
        return layer(y, text.tokens, context_img_len=text.image_tokens, transformer_options=options)
    q = layer.norm_q(layer.q(y))
    attended = [models.attention(q, k, v, layer.num_heads, options) for k, v in text.keys]
    return layer.o(attended[0] if len(attended) == 1 else attended[0] + attended[1])


def feed_forward(block: Any, x: Tensor, rows: Modulation) -> Tensor:
    """What the feed-forward adds to tokens x [1, n, C], before its gate."""
    y = modulated_norm(block.norm2, x, rows[3], rows[4])
    if len(block.ffn) != 3:
        return block.ffn(y)
    up, gelu, down = block.ffn
    return down(linear_gelu(up, gelu, y))
