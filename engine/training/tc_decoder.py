"""Trains a Tiny Conditional decoder of any width: latents and low-quality frames to good frames."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..comfyui import management
from ..flashvsr.tc_decoder import BLOCKS, FRAMES, SCALE, TCDecoder, Widths
from .pair_trainer import PairTrainer
from .pairs import Pair, PairSettings

EDGES = 0.5
"""Weight of the differences between neighbouring pixels: an L1 loss alone likes soft edges."""
RESIDUAL = 0.1
"""MemBlocks begin as nearly nothing, so that the first steps train a shallow network."""


@dataclass(frozen=True)
class DecoderSettings(PairSettings):
    """What the artist chose."""

    widths: Widths = field(default_factory=lambda: Widths(512, 256, 128, 128))


def decode_clip(decoder: TCDecoder, latents: Tensor, frames: Tensor) -> Tensor:
    """A whole clip at once, with gradients.

    latents [1, 16, T, h, w], normalised; frames [4 T - 3, 3, 8 h, 8 w] -> the same shape.
    """
    padded = torch.cat([frames[:1].expand(FRAMES - 1, -1, -1, -1), frames])
    condition = rearrange(
        padded, "(t f) c (h r) (w q) -> t (c f r q) h w", f=FRAMES, r=SCALE, q=SCALE
    )
    x = decoder.enter(torch.cat([condition, latents[0].transpose(0, 1)], dim=1))
    for level, blocks in enumerate(BLOCKS):
        for number in blocks:
            x = decoder[number](x, torch.cat([torch.zeros_like(x[:1]), x[:-1]]))
        x = decoder.finish(x) if level == len(BLOCKS) - 1 else decoder.rise(level, x)
    return x[FRAMES - 1 :]


def decoder_loss(decoded: Tensor, wanted: Tensor) -> Tensor:
    """L1 of the pixels and of the differences between neighbours, frames [n, 3, H, W]."""
    decoded = decoded.float()
    edges = [F.l1_loss(decoded.diff(dim=axis), wanted.diff(dim=axis)) for axis in (-2, -1)]
    return F.l1_loss(decoded, wanted) + EDGES * (edges[0] + edges[1])


def initialise(decoder: TCDecoder, seed: int) -> None:
    """Random weights for a training from the beginning."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in decoder.named_parameters():
        if weight.ndim == 1:
            weight.data.fill_(0.5 if name.endswith("26.bias") else 0.0)  # grey
            continue
        spread = math.sqrt(2 / weight[0].numel()) * (RESIDUAL if ".conv.4." in name else 1)
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * spread)


class DecoderTrainer(PairTrainer):
    """One run of a decoder."""

    KEY = "atlasvid_tc_decoder"
    SMALLER = "smaller side, fewer frames or smaller widths"

    def __init__(self, settings: DecoderSettings, path: Path, folder: Path) -> None:
        with torch.inference_mode(False):
            self.decoder = TCDecoder(settings.widths, device=management.compute_device())
            initialise(self.decoder, settings.seed)
            super().__init__(settings, self.decoder, path, folder)

    def loss(self, pair: Pair, generator: torch.Generator) -> Tensor:
        latents, shown = (
            x.to(self.device, self.settings.dtype) for x in (pair.latents, pair.shown)
        )
        return decoder_loss(decode_clip(self.decoder, latents, shown), pair.good.to(self.device))
