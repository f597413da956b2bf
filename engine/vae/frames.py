"""Decoded frames as an encoder wants them: quantised, in order, never all at once."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..comfyui import management
from ..device.outbox import Outbox
from .regions import Region
from .scratch import ScratchFile, require_space

COLOURS = 3
# A bit depth at which frames are kept in 16 bits.
FINE = 10

LEVELS = {8: 255, 10: 65535}
"""Integer levels that the core quantises to, per bit depth: it feeds 16-bit RGB to 10-bit video."""


@dataclass(frozen=True)
class Piece:
    """Finished frames, or a box of them.

    `images` is [t, height, width, 3] in [0, 1] and fills `box` of the frames from `start` on;
    `completes` says that no part of these frames is missing any more.
    """

    box: Region
    start: int
    images: Tensor
    completes: bool


class FrameStream(Protocol):
    """A clip whose frames are made when they are wanted, from the start, as often as needed."""

    @property
    def frames(self) -> int: ...

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    def plan(self) -> Any:
        """Loads what is needed and decides how to go about one pass."""
        ...

    def scratch_bytes(self, plan: Any) -> int:
        """Disk space that a pass needs beside its frames."""
        ...

    def pieces(self, plan: Any, folder: Path) -> Iterator[Piece]:
        """One pass over all frames; a piece may come again. Temporary files lie in `folder`."""
        ...

    def all_images(self) -> Tensor:
        """All frames [frames, height, width, 3] in [0, 1]."""
        ...


def whole_images(stream: FrameStream, folder: Path) -> Tensor:
    """What a stream's `all_images` gives, gathered from its pieces."""
    images = torch.empty(stream.frames, stream.height, stream.width, COLOURS)
    for piece in stream.pieces(stream.plan(), folder):
        rows, cols = piece.box.rows, piece.box.cols
        stop = piece.start + len(piece.images)
        images[piece.start : stop, rows.start : rows.stop, cols.start : cols.stop] = piece.images
    return images


def quantise(images: Tensor, bit_depth: int) -> Tensor:
    """Images in [0, 1] as the integers that the core hands to the encoder, rounded as it does.

    On the images' device: a quarter of the bytes, or half of them, then have to leave it.
    """
    if bit_depth == 8:
        return (images * 255).clamp(0, 255).byte()
    values = (images.float() * 65535).clamp(0, 65535).int()
    return values.short().view(torch.uint16)  # truncated twice: what is above 32767 wraps


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
    """The frames of a stream at one bit depth: decoded at the first reading, then kept."""

    def __init__(self, stream: FrameStream, bit_depth: int, folder: Path) -> None:
        self._stream = stream
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
        plan = self._stream.plan()
        needed = self._frame_bytes() + self._stream.scratch_bytes(plan)
        require_space(self._folder, needed, self._purpose())
        buffer = FrameBuffer(self._stream.height, self._stream.width, self._folder)
        done = 0
        try:
            for start in self._filling(buffer, plan):
                frames = buffer.read(start)
                done += len(frames)
                if done == self._stream.frames:  # a reader who has them all may not come again
                    self._buffer = buffer
                yield frames
        except BaseException:
            if self._buffer is not buffer:
                buffer.close()
            raise
        self._buffer = buffer

    def _filling(self, buffer: FrameBuffer, plan: Any) -> Iterator[int]:
        """Fills the buffer; the first frame of every chunk as soon as it is complete.

        One piece later: while the device makes the next, the frames of this one are encoded.
        """
        complete: list[int] = []
        emitted = -1
        with Outbox(management.compute_device()) as outbox:
            for piece in self._stream.pieces(plan, self._folder):
                values = quantise(piece.images, self._bit_depth)
                outbox.put(values, partial(buffer.write, piece.box, piece.start))
                outbox.settle(1)
                yield from complete
                complete.clear()
                # A tile that was halved after running out of memory comes again from its start.
                if piece.completes and piece.start > emitted:
                    emitted = piece.start
                    complete.append(emitted)
        yield from complete

    def _frame_bytes(self) -> int:
        stream = self._stream
        values = stream.frames * stream.height * stream.width * COLOURS
        return values * (1 if self._bit_depth == 8 else 2)

    def _purpose(self) -> str:
        stream = self._stream
        return f"Decoding {stream.frames} frames of {stream.width} x {stream.height}"
