"""Decoded frames as an encoder wants them: quantised, in order, never all at once."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .decode import Block, TiledDecoder
from .regions import Region
from .scratch import ScratchFile, require_space

LEVELS = {8: 255, 10: 65535}
"""Integer levels that the core quantises to, per bit depth: it feeds 16-bit RGB to 10-bit video."""


def quantise(images: Tensor, bit_depth: int) -> Tensor:
    """Images in [0, 1] as the integers that the core hands to the encoder, rounded as it does."""
    if bit_depth == 8:
        return (images * 255).clamp(0, 255).byte().cpu()
    values = (images.float() * 65535).clamp(0, 65535).cpu().numpy().astype(np.uint16)
    return torch.from_numpy(values)


def dequantise(frame: Tensor, bit_depth: int) -> Tensor:
    """Images in [0, 1] that `quantise` maps back to the same integers.

    The core truncates, so each value sits in the middle of its step.
    """
    return (frame.to(torch.float32) + 0.5) / LEVELS[bit_depth]


class FrameBuffer:
    """Quantised frames [frames, height, width, 3] in a file, written tile by tile."""

    def __init__(self, height: int, width: int, folder: Path) -> None:
        self._size = (height, width)
        self._store = ScratchFile(folder)
        self._blocks: dict[int, list[tuple[Region, int]]] = {}

    def write(self, box: Region, start: int, frames: Tensor) -> None:
        """Stores one tile's frames [t, h, w, 3] that begin at frame `start`."""
        self._blocks.setdefault(start, []).append((box, self._store.append(frames)))

    def read(self, start: int) -> Tensor:
        """Whole frames [t, height, width, 3] of the chunk that begins at frame `start`."""
        frames = torch.empty(0)
        for box, number in self._blocks[start]:
            tile = self._store.read(number)
            if frames.numel() == 0:
                frames = tile.new_empty(tile.shape[0], *self._size, tile.shape[-1])
            frames[:, box.rows.start : box.rows.stop, box.cols.start : box.cols.stop] = tile
        return frames

    def chunks(self) -> list[int]:
        """First frame of every stored chunk, in order."""
        return sorted(self._blocks)

    def close(self) -> None:
        self._store.close()


class DecodedFrames:
    """The frames of a latent video at one bit depth: decoded at the first reading, then kept."""

    def __init__(self, tiled: TiledDecoder, bit_depth: int, folder: Path) -> None:
        self._tiled = tiled
        self._bit_depth = bit_depth
        self._folder = folder
        self._buffer: FrameBuffer | None = None

    def batches(self) -> Iterator[Tensor]:
        """All frames in order, a few at a time, each [t, height, width, 3].

        Raises:
            OSError: the temporary folder's disk is too full for the frames.
        """
        if self._buffer is not None:
            yield from map(self._buffer.read, self._buffer.chunks())
            return
        grid = self._tiled.plan()
        needed = self._frame_bytes() + self._tiled.feature_bytes(grid)
        require_space(self._folder, needed, self._purpose())
        buffer = FrameBuffer(self._tiled.height, self._tiled.width, self._folder)
        try:
            emitted = -1
            for block in self._tiled.blocks(grid, lambda: ScratchFile(self._folder)):
                self._keep(buffer, block)
                # A tile that was halved after running out of memory comes again from its start.
                if block.completes and block.start > emitted:
                    emitted = block.start
                    yield buffer.read(block.start)
        except BaseException:
            buffer.close()
            raise
        self._buffer = buffer

    def _keep(self, buffer: FrameBuffer, block: Block) -> None:
        buffer.write(block.box, block.start, quantise(self._tiled.images(block), self._bit_depth))

    def _frame_bytes(self) -> int:
        tiled = self._tiled
        values = tiled.frames * tiled.height * tiled.width * tiled.decoder.out_channels
        return values * (1 if self._bit_depth == 8 else 2)

    def _purpose(self) -> str:
        tiled = self._tiled
        return f"Decoding {tiled.frames} frames of {tiled.width} x {tiled.height}"
