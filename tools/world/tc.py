"""Trains the Tiny Conditional decoder of the world's FlashVSR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from atlasvid.engine.comfyui import management
from atlasvid.engine.flashvsr.tc_decoder import (
    BLOCKS,
    CONDITION_CHANNELS,
    ENTRY,
    FRAMES,
    GROWS,
    SCALE,
    TAIL,
    UPS,
    TCDecoder,
    Widths,
)
from atlasvid.engine.training.tc_decoder import decode_clip, decoder_loss, initialise
from einops import rearrange
from torch import Tensor

from .linear import principal
from .training import KernelRows, Training, adamw, muon
from .vsr_pairs import Shard, as_pixels, enlarged

WIDTHS = Widths(48, 24, 16, 16)
SIDE, LATENTS = 128, 4
"""Pixels and latent frames that a step learns from."""
ROWS = 20_000
"""Of conditions, from which the components are found."""
SLOPE = 0.7
"""Of the standard deviation of what is let through, below the entry's tanh and ReLU."""


# --- The first weights ----------------------------------------------------------------------


@torch.no_grad()
def begin(decoder: TCDecoder, small: Sequence[Tensor], seed: int = 0) -> None:
    """Weights that let colours and latents through from the first step on.

    Half of the channels are the largest components of the low-quality frames, half the latent's
    first numbers, each twice, with either sign, since ReLU lets one half of a number through. After
    them stand identities.

    Args:
        small: clips uint8 [3, 4 T + 1, h, w].
    """
    generator = torch.Generator().manual_seed(seed)
    initialise(decoder, seed)
    _enter(decoder[ENTRY[0]], small, generator)
    widths = (decoder.widths.coarse, *decoder.widths.after)
    _identity(decoder[ENTRY[1]].weight, range(widths[0]), generator)
    for level, (here, after) in enumerate(pairwise(widths)):
        for number in BLOCKS[level]:
            decoder[number].conv[4].weight.mul_(0.3)
        grow = decoder[GROWS[level]].conv.weight
        _identity(grow, [*range(here)] * (len(grow) // here), generator)
        half = after // 2  # of the colours and of the latents, which come in halves
        kept = [*range(half), *range(here // 2, here // 2 + half)]
        _identity(decoder[UPS[level]].weight, kept, generator)
    _identity(decoder[TAIL[0]].weight, range(widths[-1]), generator)
    decoder[TAIL[1]].weight.mul_(0.1)


def _enter(layer: Any, small: Sequence[Tensor], generator: torch.Generator) -> None:
    count = layer.out_channels // 4
    rows = torch.cat([_conditions(clip, ROWS // len(small), generator) for clip in small])
    components, mean = principal(rows, count)
    components *= (SLOPE / ((rows - mean) @ components.T).std(0))[:, None]
    layer.weight.copy_(3e-3 * torch.randn(layer.weight.shape, generator=generator))
    layer.bias.zero_()
    for i, component in enumerate(components):
        for j, sign in enumerate((1, -1)):
            colour, latent = 2 * i + j, 2 * (count + i) + j
            layer.weight[colour, :CONDITION_CHANNELS, 1, 1] = sign * component
            layer.bias[colour] = -sign * (component @ mean)
            layer.weight[latent].zero_()
            layer.weight[latent, CONDITION_CHANNELS + i, 1, 1] = sign * SLOPE


def _conditions(small: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Up to `count` conditions [n, 768] of a clip."""
    frames = enlarged(small[None])[0, :, 1:]
    rows = rearrange(frames, "c (t f) (h r) (w q) -> (t h w) (c f r q)", f=FRAMES, r=SCALE, q=SCALE)
    return rows[torch.randperm(len(rows), generator=generator)[:count]]


def _identity(weight: Tensor, inputs: Sequence[int], generator: torch.Generator) -> None:
    """A convolution whose outputs are these inputs, with a little noise."""
    weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    for output, source in enumerate(inputs):
        weight[output, source, weight.shape[2] // 2, weight.shape[3] // 2] += 1


# --- Training -------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecoderRecipe:
    """How the decoder is trained.

    Args:
        steps: in all.
        cooldown: of the steps, the last ones, in which the learning rate falls to zero.
        batch: squares of a step.
        muon_rate: of the kernels between the two ends; 0: AdamW trains them, too.
        adam_rate: of all else.
        noise: added to the latents, up to so many times their own deviation.
        ema: decay of the averaged weights.
    """

    steps: int = 1300
    cooldown: int = 390
    warmup: int = 50
    batch: int = 2
    muon_rate: float = 1e-3
    adam_rate: float = 5e-4
    noise: float = 0.15
    ema: float = 0.99
    seed: int = 1

    def rate(self, step: int) -> float:
        """Factor on the learning rates."""
        return min((step + 1) / self.warmup, 1.0, (self.steps - step) / self.cooldown)


ON_STUDENT = DecoderRecipe(600, 180, 30, muon_rate=0.0, adam_rate=3e-4, noise=0.0, seed=2)
"""The second part, on the student's latents, which bring errors of their own."""


@dataclass(frozen=True)
class Squares:
    """Squares of a step, and their frames.

    Args:
        shards: clips.
        latents: of those shards' clips, the drawn clips' own or the student's.
    """

    shards: Sequence[Shard]
    latents: Sequence[Tensor]

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [N, 16, 4, 16, 16]; frames [N, 13, 3, 128, 128], enlarged and wanted."""
        drawn = [self._one(generator) for _ in range(count)]
        latents, shown, wanted = (torch.stack(part) for part in zip(*drawn, strict=True))
        return latents, shown, wanted

    def _one(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        def below(count: int) -> int:
            return int(torch.randint(count, (), generator=generator))

        number = below(len(self.shards))
        shard, latents = self.shards[number], self.latents[number]
        i, side = below(len(latents)), SIDE // SCALE
        first = below(latents.shape[2] - LATENTS + 1)
        top, left = (below(length - side + 1) for length in latents.shape[-2:])
        frames = slice(FRAMES * first, FRAMES * (first + LATENTS - 1) + 1)
        rows, columns = (slice(SCALE * start, SCALE * start + SIDE) for start in (top, left))
        shown = enlarged(shard.small[i : i + 1, :, frames])[0, :, :, rows, columns]
        wanted = as_pixels(shard.large[i, :, frames, rows, columns])
        part = latents[i, :, first : first + LATENTS, top : top + side, left : left + side]
        return part.float(), shown.transpose(0, 1), wanted.transpose(0, 1)


class DecoderTraining(Training):
    """L1 of the pixels and of the differences between neighbours, on squares of clips."""

    def __init__(self, decoder: TCDecoder, recipe: DecoderRecipe):
        inner = [p for name, p in decoder.named_parameters() if _is_inner(name, p)]
        kernels = KernelRows(inner if recipe.muon_rate else [])
        taken = {id(kernel) for kernel in kernels.kernels}
        rest = adamw((p for p in decoder.parameters() if id(p) not in taken), recipe.adam_rate)
        optimizers = [rest]
        if kernels.rows:
            optimizers.append(muon(kernels.rows, recipe.muon_rate))
        super().__init__(decoder, recipe, optimizers, kernels)
        self.noise = recipe.noise
        self.device = next(decoder.parameters()).device

    def update(
        self, latents: Tensor, shown: Tensor, wanted: Tensor, generator: torch.Generator
    ) -> float:
        """One step on what `Squares.draw` gives; its loss."""
        strength = self.noise * torch.rand(1, generator=generator)
        latents = latents + strength * torch.randn(latents.shape, generator=generator)
        with management.training():
            squares = zip(latents, shown, wanted, strict=True)
            losses = [self._loss(*(x.to(self.device) for x in square)) for square in squares]
            return self.descend(torch.stack(losses).mean())

    def _loss(self, latents: Tensor, shown: Tensor, wanted: Tensor) -> Tensor:
        """Of all frames but the first, whose condition lacks the three frames before it."""
        with torch.autocast(self.device.type, torch.bfloat16):
            decoded = decode_clip(self.model, latents[None], shown)
        return decoder_loss(decoded[1:], wanted[1:])


def _is_inner(name: str, weight: Tensor) -> bool:
    """Whether it is a kernel between the first and the last convolution."""
    ends = tuple(f"decoder.{number}." for number in (ENTRY[0], TAIL[1]))
    return weight.ndim == 4 and not name.startswith(ends)


@torch.no_grad()
def decoded(decoder: TCDecoder, latents: Tensor, small: Tensor) -> Tensor:
    """Clips [N, 3, 4 T - 3, H, W] in -1..1 of latents and small clips uint8, on the CPU."""
    device = next(decoder.parameters()).device
    frames = enlarged(small[:, :, : FRAMES * latents.shape[2] - 3]).transpose(1, 2)
    clips = zip(latents.float(), frames, strict=True)
    made = [decode_clip(decoder, z[None].to(device), shown.to(device)).cpu() for z, shown in clips]
    return torch.stack(made).transpose(1, 2)
