"""Low-quality frames: a clip scaled to the size of the result, as FlashVSR's networks read it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..comfyui import management
from ..vae.sources import FrameSource
from .blocks import PIXELS
from .schedule import Schedule

Size = tuple[int, int]
"""Height and width in pixels."""

KEPT_BEHIND = 32
"""The decoder follows the DiT by one chunk, of which the first is the longest."""


def padded_size(size: Size, multiple: int = PIXELS) -> Size:
    """A size rounded up to whole multiples."""
    height, width = (-(-side // multiple) * multiple for side in size)
    return height, width


@dataclass(frozen=True)
class Upscale:
    """Sizes of a clip on its way: as it comes, as the result, as the networks read it.

    The networks want multiples of 128. What is missing is added at the bottom and on the right, as
    copies of the last row and column: the picture then begins at position 0 as in training, has one
    artificial border instead of two along each axis, and shows no second content there.

    Raises:
        ValueError: a size that is not positive, or a padded size that does not hold the picture.
    """

    source: Size
    scaled: Size
    padded: Size

    def __post_init__(self) -> None:
        (height, width), (high, wide) = self.scaled, self.padded
        if min(*self.source, height, width) < 1:
            raise ValueError(
                f"Frames of {_named(self.source)} cannot become {_named(self.scaled)} pixels. "
                "Both sides must be at least 1."
            )
        if high < height or wide < width:
            raise ValueError(
                f"A picture of {_named(self.scaled)} does not fit into {_named(self.padded)}. "
                "Choose a smaller size, or the latent that was made for this one."
            )

    @classmethod
    def by(cls, source: Size, scale: float) -> Upscale:
        """`scale` times as large, each side rounded."""
        height, width = (round(side * scale) for side in source)
        return cls.to(source, (height, width))

    @classmethod
    def to(cls, source: Size, scaled: Size) -> Upscale:
        """Exactly `scaled` large; another aspect ratio stretches the picture."""
        return cls(source, scaled, padded_size(scaled))

    def resize(self, image: Tensor) -> Tensor:
        """A picture [h, w, 3 or more] in [0, 1] -> uint8 [3, height, width], by PIL's bicubic.

        The published code does this; torch's own bicubic is another kernel.
        """
        levels = (image[..., :3].float() * 255).round().clamp(0, 255).byte().cpu().numpy()
        height, width = self.scaled
        resized = Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(resized)).movedim(-1, 0).contiguous()

    def pad(self, frames: Tensor) -> Tensor:
        """[n, 3, height, width] -> padded, edges repeated at the bottom and on the right."""
        (height, width), (high, wide) = self.scaled, self.padded
        return F.pad(frames, (0, wide - width, 0, high - height), mode="replicate")

    def crop(self, frames: Tensor) -> Tensor:
        """[..., padded height, padded width] -> the picture without its padding."""
        height, width = self.scaled
        return frames[..., :height, :width]


def _named(size: Size) -> str:
    return f"{size[1]} x {size[0]}"


@dataclass(frozen=True, eq=False)
class Footage:
    """A source of frames whose number and size are known."""

    source: FrameSource
    frames: int
    size: Size

    @classmethod
    def of(cls, source: FrameSource) -> Footage:
        """Reads once what is not in memory.

        Of a file, containers only estimate the count, and name the size before rotation. A clip
        that is yet to be decoded is then kept: its VAE does not come between our models later.

        Raises:
            ValueError: there are no frames.
        """
        if source.in_memory:
            return cls(source, source.frames, source.size)
        frames, size = 0, (0, 0)
        for batch in source.batches():
            management.raise_if_cancelled()
            frames += len(batch)
            size = (batch.shape[1], batch.shape[2])
        if frames == 0:
            raise ValueError("There are no frames in this video: connect one that has some.")
        return cls(source, frames, size)


class LowQuality:
    """One pass over the up-scaled frames, for readers that move forward.

    The frames of the clip are followed by copies of the last. As uint8 and without padding, a
    bounded window of them is kept: the last one read and those up to `behind` before it.
    """

    def __init__(self, footage: Footage, upscale: Upscale, behind: int = KEPT_BEHIND) -> None:
        if upscale.source != footage.size:
            raise ValueError(
                f"The frames are {_named(footage.size)} pixels, and {_named(upscale.source)} were "
                "expected."
            )
        self.footage = footage
        self.upscale = upscale
        self.behind = behind
        self._pictures = self._resized()
        self._window: deque[Tensor] = deque()
        self._first = 0
        self._newest = 0

    @property
    def count(self) -> int:
        """Frames of the clip."""
        return self.footage.frames

    @property
    def frames_in_all(self) -> int:
        """Frames with the copies of the last that FlashVSR reads beyond the clip."""
        return Schedule(self.count).read

    def frames(self, first: int, stop: int) -> Tensor:
        """Frames first <= i < stop, float32 [n, 3, padded height, padded width] in [-1, 1].

        Raises:
            ValueError: the range is empty or begins before what is still kept, or the source has
                fewer frames than were counted.
        """
        return self.upscale.pad(self.pictures(first, stop))

    def pictures(self, first: int, stop: int) -> Tensor:
        """As `frames`, without padding: [n, 3, height, width]."""
        if not 0 <= first < stop:
            raise ValueError(f"Frames {first} to {stop} are no range; ask for 0 <= first < stop.")
        last = self.count - 1
        numbers = [min(number, last) for number in range(first, stop)]
        if numbers[0] < self._first:
            raise ValueError(
                f"Frame {numbers[0]} was asked for, but frames before {self._first} are released: "
                f"{self.behind} frames behind the last one read are kept. Read in order, or raise "
                "`behind`."
            )
        self._newest = max(self._newest, stop)
        keep = min(self._newest - self.behind, last)
        while self._first + len(self._window) <= numbers[-1]:
            self._window.append(self._next())
            self._release(min(keep, numbers[0]))
        kept = torch.stack([self._window[number - self._first] for number in numbers])
        self._release(keep)
        return kept.float() / 255 * 2 - 1

    def _release(self, first: int) -> None:
        """Lets go of the frames before `first`."""
        while self._window and self._first < first:
            self._window.popleft()
            self._first += 1

    def _next(self) -> Tensor:
        management.raise_if_cancelled()
        picture = next(self._pictures, None)
        if picture is None:
            read = self._first + len(self._window)
            raise ValueError(
                f"The video ended after {read} of {self.count} frames. It has changed since it "
                "was counted: run again."
            )
        return picture

    def _resized(self) -> Iterator[Tensor]:
        for batch in self.footage.source.batches():
            for image in batch:
                yield self.upscale.resize(image)
