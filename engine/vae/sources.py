"""Where the frames of a clip come from: tensors, files, or one image and grey."""

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ..comfyui import media
from .video import StreamedVideo

FILE_BATCH = 16
"""Frames of a file that are read at a time, at most."""
BATCH_BYTES = 2**28
"""Memory that they may take, as float32: large frames come fewer at a time."""


class FrameSource(Protocol):
    """Frames that can be read from the start as often as needed."""

    @property
    def frames(self) -> int:
        """How many frames there are; an estimate for files, used for progress only."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        ...

    @property
    def in_memory(self) -> bool:
        """Whether all frames are in memory anyway."""
        ...

    def batches(self) -> Iterator[Tensor]:
        """All frames in order, a few at a time: [n, height, width, channels] in [0, 1]."""
        ...


@dataclass(frozen=True, eq=False)
class ImageFrames:
    """An image batch [frames, height, width, channels]."""

    images: Tensor
    in_memory: bool = True

    @property
    def frames(self) -> int:
        return self.images.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        return self.images.shape[1], self.images.shape[2]

    def batches(self) -> Iterator[Tensor]:
        yield self.images


@dataclass(frozen=True, eq=False)
class FileFrames:
    """A video file, decoded anew at every reading, a few frames at a time."""

    video: Any
    in_memory: bool = False

    @property
    def frames(self) -> int:
        return media.frame_count(self.video)

    @property
    def size(self) -> tuple[int, int]:
        return self._decoded_size

    @cached_property
    def _decoded_size(self) -> tuple[int, int]:
        """That of the first frame: a phone's file is often turned when it is decoded.

        Raises:
            ValueError: the file has no frames, or see `media.video_batches`.
        """
        with closing(media.video_batches(self.video, 1)) as batches:
            for images in batches:
                return images.shape[1], images.shape[2]
        raise ValueError(f"{media.video_name(self.video)} has no frames to encode.")

    def batches(self) -> Iterator[Tensor]:
        height, width = self.size
        fitting = BATCH_BYTES // (height * width * 3 * 4)
        yield from media.video_batches(self.video, max(1, min(FILE_BATCH, fitting)))


@dataclass(frozen=True, eq=False)
class StreamedFrames:
    """A clip that is decoded when it is read, and then kept in a temporary file."""

    video: StreamedVideo
    in_memory: bool = False

    @property
    def frames(self) -> int:
        return self.video.get_frame_count()

    @property
    def size(self) -> tuple[int, int]:
        width, height = self.video.get_dimensions()
        return height, width

    def batches(self) -> Iterator[Tensor]:
        yield from self.video.batches()


@dataclass(frozen=True, eq=False)
class GreyAfter:
    """`images` first, then grey up to `frames` frames; the grey takes no memory."""

    images: Tensor
    frames: int
    in_memory: bool = False

    @property
    def size(self) -> tuple[int, int]:
        return self.images.shape[1], self.images.shape[2]

    def batches(self) -> Iterator[Tensor]:
        yield self.images
        rest = self.frames - self.images.shape[0]
        if rest > 0:
            grey = torch.full((1, 1, 1, 1), 0.5).to(self.images)
            yield grey.expand(rest, *self.images.shape[1:])


def frame_source(pixels: Any) -> FrameSource:
    """The source for an image batch or a VIDEO.

    Raises:
        ValueError: the image batch has no frames.
    """
    if isinstance(pixels, media.VideoFromFile):
        return FileFrames(pixels)
    if isinstance(pixels, StreamedVideo):
        return StreamedFrames(pixels)
    images = pixels if isinstance(pixels, Tensor) else pixels.get_components().images
    if images.shape[0] == 0:
        raise ValueError("There are no frames to encode: connect images or a video that has some.")
    return ImageFrames(images)


def sound_and_rate(pixels: Any) -> tuple[dict[str, Any] | None, Fraction | None]:
    """The AUDIO and the frame rate of a VIDEO; None for what it or an image batch does not have."""
    if isinstance(pixels, Tensor):
        return None, None
    if isinstance(pixels, StreamedVideo):
        return pixels.audio, pixels.get_frame_rate()
    if isinstance(pixels, media.VideoFromFile):
        return media.video_sound(pixels), pixels.get_frame_rate()
    components = pixels.get_components()
    return components.audio, Fraction(components.frame_rate)


class EachFrame:
    """The frames [height, width, 3] of images or a VIDEO, one after the other, at every reading.

    A video file is decoded as it is read; a video of AtlasVid Decode to Video is decoded from its
    latent once. Neither is ever in memory whole.
    """

    def __init__(self, pixels: Any):
        self._pixels = pixels

    def __iter__(self) -> Iterator[Tensor]:
        if isinstance(self._pixels, StreamedVideo):  # as it is saved: decoded once for both
            yield from self._pixels.each_frame()
            return
        for batch in frame_source(self._pixels).batches():
            for frame in batch:
                yield frame[..., :3].float()


def latent_groups(batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """The frames of one latent frame after another, and whether they are the last.

    The first group has one frame, every other four; an incomplete last group is dropped.
    """
    groups = _groups(batches)
    held = next(groups, None)
    while held is not None:
        following = next(groups, None)
        yield held, following is None
        held = following


def _groups(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    size, left = 1, None
    for batch in batches:
        waiting = batch if left is None or len(left) == 0 else torch.cat([left, batch])
        while len(waiting) >= size:
            yield waiting[:size]
            waiting, size = waiting[size:], 4
        left = waiting
