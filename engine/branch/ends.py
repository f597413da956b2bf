"""The ends of an evaluation: latent to tokens, and tokens to the output."""

from __future__ import annotations

import torch
from torch import Tensor

from ..comfyui import models
from ..device.chunks import in_chunks
from ..device.tokens import Tokens
from .evaluation import Evaluation


def embed(ev: Evaluation, tokens: list[Tokens]) -> None:
    """Fill every item's tokens from the latent, some rows of a frame at a time."""
    patch = ev.plan.space.patch
    frames, h, w = ev.plan.tokens
    for f in range(frames):
        frame = models.pad_to_patch(ev.x[:, :, f : f + 1], patch)

        def compute(top: int, bottom: int, f: int = f, frame: Tensor = frame) -> None:
            rows = frame[..., top * patch[1] : bottom * patch[1], :]
            index = _rows(ev, f, top, bottom, tokens[0].index_device)
            for store, values in zip(tokens, ev.family.embed(ev.net, rows), strict=True):
                store.write(index, values)

        in_chunks(range(w, h * w + 1, w), ev.chunk, compute)
    for store in tokens:
        store.settle()


def head(ev: Evaluation, tokens: list[Tokens], e: Tensor) -> Tensor:
    """The output latent [B, C_out, T, H, W], some rows of a frame at a time.

    Args:
        e: the time embedding [B, 1 or frames, C].
    """
    x, channels = ev.x, ev.plan.space.channels
    height, width = x.shape[-2:]
    frames, h, w = ev.plan.tokens
    rows_per_token = ev.plan.space.patch[1]
    out = x.new_empty((len(x), channels, *x.shape[2:]))
    for f in range(frames):

        def compute(top: int, bottom: int, f: int = f) -> None:
            index = _rows(ev, f, top, bottom, tokens[0].index_device)
            place = slice(top * rows_per_token, min(bottom * rows_per_token, height))
            for item, store in enumerate(tokens):
                own = e[item : item + 1, f : f + 1] if e.shape[1] > 1 else e[item : item + 1]
                pixels = ev.family.head(ev.net, store.read(index)[None], own, w)
                out[item, :, f, place] = pixels[:, : height - place.start, :width]

        in_chunks(range(w, h * w + 1, w), ev.chunk, compute)
    return out


def _rows(ev: Evaluation, f: int, top: int, bottom: int, device: torch.device) -> Tensor:
    """Raster indices of rows `top` to `bottom` of one latent frame's tokens."""
    _, h, w = ev.plan.tokens
    first = (f * h + top) * w
    return torch.arange(first, first + (bottom - top) * w, device=device)
