"""A video that is decoded while it is written."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..comfyui import media, server
from .frames import FINE, DecodedFrames, FrameStream, dequantise
from .scratch import full_disk_named, scratch_name, sweep

# What PyAV calls the container of an mp4 file.
MP4_FORMAT = "mov,mp4,m4a,3gp,3g2,mj2"


@dataclass(frozen=True)
class Excerpt:
    """Frames first <= i < stop at `frame_rate`, with the sound [batch, channels, samples]."""

    first: int
    stop: int
    frame_rate: Fraction
    audio: dict[str, Any] | None

    @property
    def frames(self) -> int:
        return self.stop - self.first

    @property
    def duration(self) -> float:
        """Seconds."""
        return float(self.frames / self.frame_rate)

    def trimmed(self, start_time: float, duration: float, strict: bool) -> "Excerpt | None":
        """The clip from `start_time` (negative: from the end) for `duration` seconds.

        A duration of 0 means until the end. None where nothing is left, or where `strict` asks
        for more than there is.
        """
        start = max(self.duration + start_time, 0.0) if start_time < 0 else start_time
        length = duration or self.duration - start
        if strict and start + length > self.duration + 1e-6:
            return None
        first = self.first + self._frame_at(start)
        stop = min(self.stop, self.first + self._frame_at(start + length))
        if first >= stop:
            return None
        return replace(self, first=first, stop=stop, audio=self._trim_audio(start, length))

    def _frame_at(self, seconds: float) -> int:
        """The first frame shown at or after `seconds`."""
        return math.ceil(seconds * float(self.frame_rate) - 1e-6)

    def _trim_audio(self, start: float, length: float) -> dict[str, Any] | None:
        if not self.audio:
            return None
        rate = self.audio["sample_rate"]
        samples = slice(int(start * rate), int((start + length) * rate))
        return {**self.audio, "waveform": self.audio["waveform"][..., samples]}


class LazyFrames:
    """Looks like an image batch [frames, height, width, 3] to an encoder that walks through it."""

    def __init__(
        self, decoded: DecodedFrames, excerpt: Excerpt, size: tuple[int, int], bit_depth: int
    ):
        self.shape = torch.Size((excerpt.frames, *size, 3))
        self._decoded = decoded
        self._excerpt = excerpt
        self._bit_depth = bit_depth

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        number = 0
        for batch in self._decoded.batches():
            for frame in batch:
                if self._excerpt.first <= number < self._excerpt.stop:
                    yield dequantise(frame, self._bit_depth)
                number += 1


class StreamedVideo(media.VideoInput):
    """A clip that stock nodes save, trim and measure without its frames in memory."""

    def __init__(
        self,
        stream: FrameStream,
        frame_rate: Fraction,
        audio: dict[str, Any] | None = None,
        bit_depth: int = 8,
    ) -> None:
        media.require_bit_depth(bit_depth)
        self._stream = stream
        self._excerpt = Excerpt(0, stream.frames, frame_rate, audio)
        self._bit_depth = bit_depth
        self._decoded: dict[int, DecodedFrames] = {}

    def save_to(
        self,
        path: Any,
        format: Any = None,
        codec: Any = None,
        metadata: dict | None = None,
        bit_depth: int | None = None,
        crf: float | None = None,
    ) -> None:
        """Decodes into `path`, a file or a buffer; the file appears when it is whole."""
        depth = self._bit_depth if bit_depth is None else bit_depth
        media.require_bit_depth(depth)
        images = LazyFrames(self._frames(depth), self._excerpt, self._size, depth)
        clip = self._excerpt
        components = media.video_components(images, clip.frame_rate, clip.audio)
        choices = {"format": format, "codec": codec, "metadata": metadata, "crf": crf}
        given = {name: value for name, value in choices.items() if value is not None}
        with whole_file(path) as target:
            media.encode_video(components, target, depth, **given)

    def each_frame(self) -> Iterator[Tensor]:
        """Its frames [height, width, 3] in order, as they are saved; decoded once, then kept."""
        depth = self._bit_depth
        yield from LazyFrames(self._frames(depth), self._excerpt, self._size, depth)

    def _frames(self, bit_depth: int) -> DecodedFrames:
        if bit_depth not in self._decoded:
            folder = server.temp_directory()
            self._decoded[bit_depth] = DecodedFrames(self._stream, bit_depth, folder)
        return self._decoded[bit_depth]

    @property
    def _size(self) -> tuple[int, int]:
        return self._stream.height, self._stream.width

    def get_components(self) -> Any:
        """All pixels, decoded again in full precision."""
        clip = self._excerpt
        images = self._stream.all_images()[clip.first : clip.stop]
        return media.video_components(images, clip.frame_rate, clip.audio)

    def batches(self) -> Iterator[Tensor]:
        """All frames [n, height, width, 3] in [0, 1], in 16 bits, a few at a time."""
        for frame in LazyFrames(self._frames(FINE), self._excerpt, self._size, FINE):
            yield frame[None]

    @property
    def audio(self) -> dict[str, Any] | None:
        """Its sound, if any."""
        return self._excerpt.audio

    def as_trimmed(
        self,
        start_time: float | None = None,
        duration: float | None = None,
        strict_duration: bool = False,
    ) -> "StreamedVideo | None":
        """The same decode with fewer frames; nothing is decoded, and buffers are shared."""
        clip = self._excerpt.trimmed(start_time or 0.0, duration or 0.0, strict_duration)
        if clip is None:
            return None
        video = StreamedVideo(self._stream, clip.frame_rate, bit_depth=self._bit_depth)
        video._excerpt, video._decoded = clip, self._decoded
        return video

    def get_dimensions(self) -> tuple[int, int]:
        height, width = self._size
        return width, height

    def get_bit_depth(self) -> int:
        return self._bit_depth

    def get_duration(self) -> float:
        return self._excerpt.duration

    def get_frame_count(self) -> int:
        return self._excerpt.frames

    def get_frame_rate(self) -> Fraction:
        return self._excerpt.frame_rate

    def get_container_format(self) -> str:
        return MP4_FORMAT


@contextmanager
def whole_file(path: Any) -> Iterator[Any]:
    """Gives a hidden neighbour of `path` to write to, renamed to `path` when all went well.

    A buffer passes through as it is. After a failure or cancel nothing is left; what a killed
    process left is removed at the next save into the folder.
    """
    if not isinstance(path, str | os.PathLike):
        yield path
        return
    final = Path(path)
    sweep(final.parent)
    partial = final.with_name("." + scratch_name(final.suffix))
    try:
        with full_disk_named(final.parent, f"Saving {final.name}"):
            yield str(partial)
            partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)
