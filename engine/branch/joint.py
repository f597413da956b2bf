"""A guide that is denoised beside the target: its latent from step to step (method: stage 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COND, UNCOND = 0, 1
"""ComfyUI's numbers for the two kinds of conditioning."""


class JointGuide:
    """The guide's noised latent in a sampling run, moved by its own predicted velocities.

    Euler's method over the noise levels at which the target's sampler evaluates the model, with
    classifier-free guidance as the target has it. A level that is evaluated again finds the guide
    where it was.

    Args:
        latent: the guide at the first level [V, C, F_g, H_g, W_g] of every video, float32.
        sigma: that level [V, 1, 1 or F_g, 1, 1].
        cfg: scale of classifier-free guidance.
    """

    def __init__(self, latent: Tensor, sigma: Tensor, cfg: float):
        self._latent, self._sigma, self._cfg = latent, sigma, cfg
        self._velocities: dict[int, Tensor] = {}

    def at(self, sigma: Tensor) -> Tensor:
        """The guide at a noise level: where it is, or an Euler step away."""
        if self._velocities and not torch.equal(sigma, self._sigma):
            self._latent = self._latent + (sigma - self._sigma) * self._velocity()
            self._velocities.clear()
        self._sigma = sigma
        return self._latent

    def record(self, velocity: Tensor, kinds: Sequence[int]) -> None:
        """Take what the model predicts for the guide at the present level.

        Args:
            velocity: [B, C, F_g, H_g, W_g], the videos of one conditioning after another.
            kinds: COND or UNCOND of each conditioning.
        """
        for kind, part in zip(kinds, velocity.chunk(len(kinds)), strict=True):
            self._velocities[kind] = part.float()

    def _velocity(self) -> Tensor:
        with_text, without = self._velocities.get(COND), self._velocities.get(UNCOND)
        if with_text is None or without is None:
            return next(iter(self._velocities.values()))
        return without + self._cfg * (with_text - without)
