"""What decoding a video needs of a device, from sizes alone: no VAE is loaded."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..comfyui import media
from .middle import room
from .tiling import CostModel, grid_within
from .wan import WanDecoder


@lru_cache(maxsize=4)
def _decoder(spatial: int, channels: int) -> WanDecoder:
    """A decoder without memory for its weights, by the VAE's spatial factor and base channels."""
    with torch.device("meta"):
        if spatial == 16:
            return WanDecoder(media.build_wan22_vae(), patch=2)
        return WanDecoder(media.build_wan_vae(channels), patch=1)


@lru_cache(maxsize=64)
def least_decode_bytes(
    spatial: int, channels: int, size: tuple[int, int], element_bytes: int
) -> int:
    """Bytes that have to fit on the device: the weights, and the smallest pieces of a decode.

    Args:
        spatial: the VAE's, 8 (Wan 2.1) or 16 (Wan 2.2).
        channels: its base channels, where they vary (Wan 2.1).
        size: height and width of the latent.
    """
    decoder = _decoder(spatial, channels)
    cost = CostModel(decoder.chain, *size, 1, 8, decoder.whole_macs, element_bytes)
    tiles = cost.peak_bytes(grid_within(cost, 0))
    whole = room(decoder.middle, *size, element_bytes, 0).peak
    weights = element_bytes * sum(p.numel() for p in decoder.model.parameters())
    return weights + max(tiles, whole)
