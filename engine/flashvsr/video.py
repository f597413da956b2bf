"""From a clip to the VIDEO and the latent that FlashVSR makes of it."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from torch import Tensor

from ..comfyui import media, server
from ..device.budget import AUTO
from ..vae.decode import TiledDecoder
from ..vae.scratch import require_space
from ..vae.sources import frame_source, sound_and_rate
from ..vae.video import StreamedVideo
from .bundle import FlashVSR
from .corrected import CorrectedDecode
from .selection import PUBLISHED, Sparsity
from .source import Footage, Upscale
from .tc_decoder import WAN_RATE, conditioned_clip
from .upscale import Job, upscaled_latent

DECODERS = ("tiny conditional", "Wan VAE")
MOST_PIXELS = 16_384


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
        OSError: the temporary folder's disk is too full for latent and frames.
    """
    require_decoder(flashvsr, decoder, vae)
    media.require_bit_depth(bit_depth)
    footage = Footage.of(frame_source(pixels))
    upscale = Upscale.to(footage.size, target_size(footage.size, scale, width, height))
    job = Job(footage, upscale, sparsity, seed, budget, bit_depth)
    require_space(server.temp_directory(), job.disk, job.purpose)
    latent = upscaled_latent(flashvsr, job)
    if decoder == DECODERS[0]:
        stream: Any = conditioned_clip(flashvsr, latent, footage, upscale.scaled, colour, budget)
    else:
        stream = CorrectedDecode(TiledDecoder(vae, latent, budget), footage, upscale, colour)
    sound, rate = sound_and_rate(pixels)
    return StreamedVideo(
        stream, Fraction(fps) if fps else rate or WAN_RATE, sound, bit_depth
    ), latent


def target_size(size: tuple[int, int], scale: float, width: int, height: int) -> tuple[int, int]:
    """Height and width of the result for a picture of `size` (height, width).

    Raises:
        ValueError: a side is longer than 16384 pixels.
    """
    own_height, own_width = size
    high, wide = height, width
    if not height:
        high = max(1, round(own_height * (width / own_width if width else scale)))
    if not width:
        wide = max(1, round(own_width * (height / own_height if height else scale)))
    if max(high, wide) > MOST_PIXELS:
        raise ValueError(
            f"Frames of {own_width} x {own_height} would become {wide} x {high} pixels; at most "
            f"{MOST_PIXELS} a side are possible. Lower scale, or set width or height."
        )
    return high, wide


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
