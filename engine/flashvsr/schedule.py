"""Which frames FlashVSR reads and writes, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

LOOK_AHEAD = 4
"""Frames that the conditioning runs ahead of what is decoded."""
FIRST_CHUNK = 6
"""Latent frames of the first chunk, which sees all of itself; every other has one slot."""
SLOT = 2
"""Latent frames that share keys, a threshold and a place in the cache."""


@dataclass(frozen=True)
class Chunk:
    """Latent frames first <= t < stop, evaluated together."""

    first: int
    stop: int

    @property
    def slots(self) -> int:
        return (self.stop - self.first) // SLOT


@dataclass(frozen=True)
class Schedule:
    """A clip of `frames` frames, one or more, none of which is lost.

    The published schedule takes 8m + 5 frames, 21 or more; other lengths repeat the last frame up
    to the next of these and are cut at the end.
    """

    frames: int

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"A clip of {self.frames} frames cannot be up-scaled: it needs one.")

    @property
    def read(self) -> int:
        """Low-quality frames that are read: copies of the last stand behind the clip. 8m + 1."""
        return max(25, -(-(self.frames + LOOK_AHEAD - 1) // 8) * 8 + 1)

    @property
    def decoded(self) -> int:
        """Frames that the latent decodes to, at least as many as the clip has."""
        return self.read - LOOK_AHEAD

    @property
    def latent_frames(self) -> int:
        return (self.read - 1) // 4

    @property
    def count(self) -> int:
        """Chunks."""
        return (self.latent_frames - FIRST_CHUNK) // SLOT + 1

    def chunks(self) -> Iterator[Chunk]:
        """All chunks in order."""
        yield Chunk(0, FIRST_CHUNK)
        for first in range(FIRST_CHUNK, self.latent_frames, SLOT):
            yield Chunk(first, first + SLOT)
