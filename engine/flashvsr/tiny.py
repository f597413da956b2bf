"""A small FlashVSR, to try graphs without downloads."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..comfyui import models
from ..families.tiny import WORLD, random_weights, wan_state, world_state
from ..families.wan import TEXT_WIDTH
from .bundle import FlashVSR
from .files import projection_of
from .projection import LowQualityProjection
from .tc_decoder import TCDecoder, Widths, load_tc_decoder

VERSION = "v1.1"
RANDOM_WIDTHS = (32, 48)
RANDOM_DECODER = Widths(24, 16, 16, 16)
PROMPT = "prompt"
LOCAL_RANGE = 3
"""Blocks around a block that the trained family has seen: clips of 2 x 2."""


def trained_flashvsr(folder: Path = WORLD) -> FlashVSR:
    """The family that was trained on the tiny world.

    Raises:
        ValueError: a file is missing, cut short, or of another version of this pack.
    """
    rest = world_state("flashvsr", folder)
    prompt = rest.pop(PROMPT)
    return _bundle(
        world_state("flashvsr_transformer", folder),
        {name.removeprefix("projection."): v for name, v in rest.items() if "projection." in name},
        prompt,
        {name: value for name, value in rest.items() if name.startswith("decoder.")},
    )


def random_flashvsr(seed: int) -> FlashVSR:
    """Random weights: every code path, and noise for a picture."""
    state = wan_state(seed)
    dim = state["patch_embedding.weight"].shape[0]
    generator = torch.Generator().manual_seed(seed)
    return _bundle(
        state,
        random_weights(LowQualityProjection((*RANDOM_WIDTHS, dim)), seed),
        torch.randn(1, 1, TEXT_WIDTH, generator=generator),
        random_weights(TCDecoder(RANDOM_DECODER), seed),
    )


def _bundle(
    transformer: dict[str, Tensor],
    projection: dict[str, Tensor],
    prompt: Tensor,
    decoder: dict[str, Tensor],
) -> FlashVSR:
    return FlashVSR(
        models.load_diffusion_model(transformer),
        models.patcher(projection_of(projection)),
        prompt,
        models.patcher(load_tc_decoder(decoder, torch.float32)),
        VERSION,
    )
