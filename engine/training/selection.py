"""Which clips are worth learning from: how much moves in them, and how sharp they are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from .clips import Unusable, resized

MOST_REPEATS = 4
MOTION_WIDTH = 96
"""Pixels across at which motion is looked at: noise and grain are gone by then."""


@dataclass(frozen=True)
class Worth:
    """What a cut has to teach, in grey levels (1/255)."""

    motion: float
    """Root mean square of the change from frame to frame, at a small size."""
    sharpness: float
    """Root mean square of what a grid of half the size, or of the proxy's, cannot hold."""

    def __str__(self) -> str:
        return f"motion {self.motion:.2f}, sharpness {self.sharpness:.2f}"


@dataclass(frozen=True)
class Selection:
    """What is asked of a cut.

    Args:
        min_motion, min_sharpness: grey levels; below either a cut is left out.
        weighted: whether cuts with more motion and sharpness are learned from more often.
    """

    min_motion: float = 0.0
    min_sharpness: float = 0.0
    weighted: bool = False

    @property
    def is_asked(self) -> bool:
        return self.weighted or max(self.min_motion, self.min_sharpness) > 0

    def require(self, worth: Worth) -> None:
        """Raises Unusable where a cut has less than is asked."""
        for name, least in (("motion", self.min_motion), ("sharpness", self.min_sharpness)):
            if getattr(worth, name) < least:
                raise Unusable(f"{worth}; a {name} of at least {least:g} was asked for")

    def repeats(self, worths: Iterable[Worth]) -> list[int]:
        """How often each cut is learned from in an epoch: 1, or 1 to 4 where it is weighted.

        As often as the geometric mean of its motion and sharpness stands to the median's.
        """
        values = [math.sqrt(worth.motion * worth.sharpness) for worth in worths]
        if not self.weighted or not values:
            return [1] * len(values)
        usual = median(values) or 1.0
        return [max(1, min(MOST_REPEATS, round(value / usual))) for value in values]

    def describe(self) -> str:
        """What was asked, for the report."""
        asked = (
            f"Asked for: motion of at least {self.min_motion:g}, sharpness of at least "
            f"{self.min_sharpness:g}"
        )
        return asked + ("; more of both counts more often." if self.weighted else ".")


def worth_of(frames: Tensor, size: tuple[int, int]) -> Worth:
    """The worth of a cut.

    Args:
        frames: uint8 [N, H, W, 3].
        size: width and height of the grid above which detail counts.
    """
    height, width = frames.shape[1:3]
    across = min(width, MOTION_WIDTH)
    small = resized(frames, across, max(1, round(height * across / width))).float()
    motion = _rms(small.diff(dim=0)) if len(small) > 1 else 0.0
    middle = frames[len(frames) // 2][None]
    sharpness = _rms(middle.float() - resized(resized(middle, *size), width, height).float())
    return Worth(motion, sharpness)


def _rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


def as_tensor(worth: Worth) -> Tensor:
    """[2], for a sample's file."""
    return torch.tensor([worth.motion, worth.sharpness])
