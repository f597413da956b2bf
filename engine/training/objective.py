"""Wan's flow-matching objective: x_sigma = (1 - sigma) x_0 + sigma noise, target noise - x_0."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class NoiseLevels:
    """From which noise levels training draws: uniform in time, then shifted.

    Args:
        shift: s in sigma = s u / (1 + (s - 1) u); more than 1 favours high noise.
        low, high: range of sigma, for example of one of Wan 2.2's two experts.
    """

    shift: float = 5.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift is {self.shift}; it must be above 0 (Wan uses 3 to 8).")
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(
                f"sigma_min is {self.low} and sigma_max is {self.high}; they must lie in 0 to 1, "
                "the smaller first."
            )

    def sigma(self, u: float) -> float:
        """The noise level of u in 0 to 1."""
        first, last = self._time(self.low), self._time(self.high)
        u = first + (last - first) * u
        return self.shift * u / (1 + (self.shift - 1) * u)

    def _time(self, sigma: float) -> float:
        """The inverse of the shift."""
        return sigma / (self.shift - (self.shift - 1) * sigma)


def step_generator(seed: int, *place: int) -> torch.Generator:
    """Random numbers of one place in a training run (step, process, ...), and of no other.

    So a resumed run draws what an uninterrupted one would, without any saved generator state.
    """
    digest = hashlib.sha256(repr((seed, *place)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def sample_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch visits the samples."""
    return torch.randperm(count, generator=step_generator(seed, -1, epoch)).tolist()


def noised(latent: Tensor, sigma: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x_sigma and the velocity to predict, of a latent [B, C, T, H, W]."""
    noise = torch.randn(latent.shape, generator=generator)
    return (1 - sigma) * latent + sigma * noise, noise - latent


def flow_loss(predicted: Tensor, velocity: Tensor) -> Tensor:
    """Mean squared error in float32, over target tokens: the guide's output is never predicted."""
    return F.mse_loss(predicted.float(), velocity.float())
