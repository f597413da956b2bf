"""From a clip to the VIDEO and the latent that FlashVSR makes of it."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from torch import Tensor

from ..device.budget import AUTO
from ..vae.decode import TiledDecoder
from ..vae.sources import frame_source, sound_and_rate
from ..vae.video import StreamedVideo
from .bundle import FlashVSR
from .corrected import CorrectedDecode
from .selection import PUBLISHED, Sparsity
from .source import Footage, Upscale
from .tc_decoder import WAN_RATE, conditioned_clip
from .upscale import Job, upscaled_latent

DECODERS = ("tiny conditional", "Wan VAE")


def upscaled_video(
    flashvsr: FlashVSR,
    pixels: Any,
    *,
    scale: float = 4.0,
    width: int = 0,
    height: int = 0,
    sparsity: Sparsity = PUBLISHED,
    colour: str = "adain",
    seed: int = 0,
    decoder: str = DECODERS[0],
    vae: Any = None,
    budget: str = AUTO,
    fps: float = 0.0,
    bit_depth: int = 8,
) -> tuple[StreamedVideo, Tensor]:
    """The VIDEO, decoded while it is saved, and the ComfyUI latent, with its padding.

    Args:
        pixels: IMAGE or VIDEO.
        width, height: of the result in pixels; 0 follows the other, both 0 the scale.
        vae: for the decoder "Wan VAE".
        fps: frames per second; 0: the video's own, or 16.

    Raises:
        ValueError: the decoder that was asked for is not there, or a size is impossible.
    """
    require_decoder(flashvsr, decoder, vae)
    footage = Footage.of(frame_source(pixels))
    upscale = Upscale.to(footage.size, target_size(footage.size, scale, width, height))
    latent = upscaled_latent(flashvsr, Job(footage, upscale, sparsity, seed, budget))
    if decoder == DECODERS[0]:
        stream: Any = conditioned_clip(flashvsr, latent, footage, upscale.scaled, colour, budget)
    else:
        stream = CorrectedDecode(TiledDecoder(vae, latent, budget), footage, upscale, colour)
    sound, rate = sound_and_rate(pixels)
    return StreamedVideo(
        stream, Fraction(fps) if fps else rate or WAN_RATE, sound, bit_depth
    ), latent


def target_size(size: tuple[int, int], scale: float, width: int, height: int) -> tuple[int, int]:
    """Height and width of the result for a picture of `size` (height, width)."""
    own_height, own_width = size
    if width and height:
        return height, width
    if width:
        return max(1, round(own_height * width / own_width)), width
    if height:
        return height, max(1, round(own_width * height / own_height))
    return max(1, round(own_height * scale)), max(1, round(own_width * scale))


def require_decoder(flashvsr: FlashVSR, decoder: str, vae: Any) -> None:
    """Raises ValueError where the decoder that was asked for is not there."""
    if decoder not in DECODERS:
        raise ValueError(f"decoder is {decoder!r}; allowed are {', '.join(DECODERS)}.")
    if decoder == DECODERS[0] and flashvsr.tc_decoder is None:
        raise ValueError(
            "FlashVSR was loaded without its Tiny Conditional decoder. Choose the TCDecoder file "
            'in the loader, or set decoder to "Wan VAE" and connect the Wan 2.1 VAE.'
        )
    if decoder == DECODERS[1] and vae is None:
        raise ValueError('decoder is "Wan VAE": connect the Wan 2.1 VAE to vae.')
