"""What a long step is doing, in words: phase, blocks done, time left."""

from __future__ import annotations

import time

from ..comfyui import management, server

INTERVAL = 0.5
"""Seconds between two messages."""


class RunProgress:
    """Tells the artist where a sampling run is, and cancels within it.

    The number of forwards per step is learned from the first step.

    Args:
        schedule: noise levels of the run, falling; empty where unknown.
        blocks: blocks of the model.
        tokens: target tokens of one video.
    """

    def __init__(self, schedule: tuple[float, ...], blocks: int, tokens: int):
        self.schedule = schedule[:-1]
        self.steps = len(self.schedule)
        self.blocks = blocks
        self.tokens = tokens
        self._step = 0
        self._forward = 0
        self._forwards_per_step = 1
        self._begun = time.monotonic()
        self._first: int | None = None
        """The step of the first forward; those before it were kept from an earlier run."""
        self._spoken = 0.0

    def begin_forward(self, sigma: float) -> None:
        """A forward at noise level `sigma` begins; samplers may also visit levels in between."""
        reached = sum(level >= sigma * (1 - 1e-4) for level in self.schedule)
        step = max(1, reached, self._step)
        if self._first is None:
            self._first, self._begun = step, time.monotonic()
        self._forward = self._forward + 1 if step == self._step else 0
        self._step = step
        self._forwards_per_step = max(self._forwards_per_step, self._forward + 1)

    def fraction(self, block: int) -> float:
        """Share of the run that is done when `block` blocks of this forward are."""
        in_step = (self._forward + block / self.blocks) / self._forwards_per_step
        return min(1.0, (self._step - 1 + in_step) / max(1, self.steps))

    def done(self) -> None:
        """The run has ended: what was done, in place of the last step's line."""
        if self._step:
            spent = duration(time.monotonic() - self._begun)
            steps = self._step - (self._first or 1) + 1
            server.show_progress(f"detail done: {steps} steps in {spent}, {self.tokens:,} tokens")

    def at_block(self, block: int, phase: str) -> None:
        """Block number `block` of this forward begins."""
        management.raise_if_cancelled()
        now = time.monotonic()
        if now - self._spoken < INTERVAL:
            return
        self._spoken = now
        step = f"step {self._step}/{self.steps}" if self.steps else f"step {self._step}"
        parts = [phase, step, f"block {block + 1}/{self.blocks}"]
        done = self.fraction(block)
        first = self._first or 1
        if self.steps and self._step > first:  # the first step also learns and fills caches
            before = (first - 1) / self.steps
            left = (now - self._begun) * (1 - done) / (done - before)
            parts.append(f"about {duration(left)} left")
        server.show_progress(", ".join(parts))


def duration(seconds: float) -> str:
    """Seconds in the two units that matter: 42 s, 3 min 20 s, 2 h 5 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
