"""Noise that depends on where it lies, not on how long or large the video is."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from .blocks import PIXELS, BlockGrid

CHANNELS = 16
LATENT_SIDE = PIXELS // 8


def placed_noise(seed: int, frame: int, grid: BlockGrid) -> Tensor:
    """Normal noise of one latent frame [16, height, width], float32 on the CPU.

    Each block of 16 x 16 latent pixels has a generator of its own, seeded by the artist's seed,
    the frame's number and the block's place: a longer clip begins like a shorter one, and a larger
    picture has the smaller one's noise in its corner.
    """
    noise = torch.empty(CHANNELS, grid.rows * LATENT_SIDE, grid.columns * LATENT_SIDE)
    generator = torch.Generator()
    for row in range(grid.rows):
        for column in range(grid.columns):
            place = hashlib.blake2b(f"{seed} {frame} {row} {column}".encode(), digest_size=8)
            generator.manual_seed(int.from_bytes(place.digest(), "big") >> 1)
            top, left = row * LATENT_SIDE, column * LATENT_SIDE
            noise[:, top : top + LATENT_SIDE, left : left + LATENT_SIDE] = torch.randn(
                CHANNELS, LATENT_SIDE, LATENT_SIDE, generator=generator
            )
    return noise
