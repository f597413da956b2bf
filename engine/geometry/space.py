"""How a model family packs pixels into latents."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LatentSpace:
    """How a model family packs pixels into latents."""

    channels: int
    spatial: int
    """Pixels per latent, height and width."""
    temporal: int
    """Frames per latent after the first."""
    patch: tuple[int, int, int]
    """Latents per token: frames, height, width."""
