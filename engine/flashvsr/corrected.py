"""An exact Wan decode in the colours of the low-quality frames, without padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..comfyui import management, server
from ..vae.decode import TiledDecoder
from ..vae.frames import FINE, DecodedFrames, Piece, dequantise, whole_images
from ..vae.regions import Region, Span
from .colour import colour_method
from .source import Footage, LowQuality, Upscale


@dataclass(frozen=True, eq=False)
class CorrectedDecode:
    """A clip decoded by the VAE when its frames are wanted (a FrameStream).

    Colours are matched over whole frames, so that those wait on the disk, in 16 bits, until all
    their tiles are there.
    """

    tiled: TiledDecoder
    footage: Footage
    upscale: Upscale
    colour: str

    @property
    def frames(self) -> int:
        return self.footage.frames

    @property
    def height(self) -> int:
        return self.upscale.scaled[0]

    @property
    def width(self) -> int:
        return self.upscale.scaled[1]

    def plan(self) -> Any:
        """Loads the VAE."""
        return self.tiled.plan()

    def scratch_bytes(self, plan: Any) -> int:
        """Features that wait for their neighbours, and the uncorrected frames."""
        frames = self.tiled.frames * self.tiled.height * self.tiled.width * 3 * 2
        return self.tiled.scratch_bytes(plan) + frames

    def pieces(self, plan: Any, folder: Path) -> Iterator[Piece]:
        """The frames in order, as many at a time as one latent frame gives."""
        correct = colour_method(self.colour)
        low_quality = LowQuality(self.footage, self.upscale)
        box = Region(Span(0, self.height), Span(0, self.width))
        start = 0
        for batch in DecodedFrames(self.tiled, FINE, folder).batches():
            management.raise_if_cancelled()
            wanted = batch[: self.frames - start]
            if len(wanted) == 0:
                return
            frames = torch.stack([dequantise(frame, FINE) for frame in wanted]).movedim(-1, 1)
            pictures = self.upscale.crop(frames) * 2 - 1
            corrected = correct(pictures, low_quality.pictures(start, start + len(wanted)))
            images = ((corrected + 1) / 2).clamp(0, 1).movedim(1, -1)
            yield Piece(box, start, images, completes=True)
            start += len(images)

    def all_images(self) -> Tensor:
        """All frames [frames, height, width, 3] in [0, 1]."""
        return whole_images(self, server.temp_directory())
