"""The plan of a video: target, proxy and how their frames, latents and tokens relate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .alignment import GuideAlignment
from .grid import Grid
from .space import LatentSpace
from .windows import COMPACT, trained_size

MIN_SIDE, MAX_SIDE = 128, 8192
MAX_STRIDE = 8
MIN_SECONDS, MAX_SECONDS = 0.05, 600.0
MIN_FPS, MAX_FPS = 1.0, 120.0
TRAINED_FRAMES = 81
"""Frames of the clips that Wan was trained on."""


@dataclass(frozen=True)
class Plan:
    """What is made and by way of which proxy (docs/method.md: symbols).

    Sizes are pixels and frames; latents and token grids follow from the model's latent space.
    """

    width: int
    height: int
    frames: int
    fps: float
    temporal_stride: int
    proxy_width: int
    proxy_height: int
    proxy_frames: int
    space: LatentSpace
    notes: tuple[str, ...] = ()
    """What was rounded, in words."""

    @property
    def latent(self) -> Grid:
        """Latent size of the target."""
        return self._latent(self.frames, self.height, self.width)

    @property
    def proxy_latent(self) -> Grid:
        """Latent size of the proxy."""
        return self._latent(self.proxy_frames, self.proxy_height, self.proxy_width)

    @property
    def tokens(self) -> Grid:
        """Token grid of the target."""
        return self.latent.patches(self.space.patch)

    @property
    def proxy_tokens(self) -> Grid:
        """Token grid of the proxy, as the detail branch reads it."""
        return self.proxy_latent.patches(self.space.patch)

    @property
    def proxy_fps(self) -> float:
        return self.fps / self.temporal_stride

    @property
    def ratio(self) -> float:
        """Target pixels per proxy pixel along the shorter side, to two digits."""
        sides = (self.width, self.height), (self.proxy_width, self.proxy_height)
        target, proxy = map(min, sides)
        return round(target / proxy, 2)

    def _latent(self, frames: int, height: int, width: int) -> Grid:
        scale = self.space.spatial
        return Grid((frames - 1) // self.space.temporal + 1, height // scale, width // scale)

    def alignment(self, window: Grid, guide_margin: int = 0) -> GuideAlignment:
        """Which of the guide's tokens windows of this size read, `guide_margin` more on each side.

        `window` is not larger than the target's grid.
        """
        return GuideAlignment(
            self.tokens, self.proxy_tokens, self.temporal_stride, window, guide_margin
        )

    def keys_per_query(self, window: Grid, guide_margin: int = 0) -> tuple[int, int]:
        """Keys that a query of a full window reads: (of its window, of the guide)."""
        window = window.clipped(self.tokens)
        return window.count, self.alignment(window, guide_margin).count.count

    def describe(self) -> str:
        """The plan in words: sizes, what was rounded, tokens and keys per query."""
        lines = [
            f"Target {self.width} x {self.height}, {self.frames} frames at {self.fps:g} fps "
            f"({self.frames / self.fps:.2f} s), {self.tokens.count:,} tokens ({self.tokens}).",
            f"Proxy {self.proxy_width} x {self.proxy_height}, {self.proxy_frames} frames at "
            f"{self.proxy_fps:g} fps, {self.proxy_tokens.count:,} tokens ({self.proxy_tokens}).",
        ]
        for name, window in (
            ("compact", COMPACT),
            ("trained size", trained_size(self.proxy_tokens)),
        ):
            own, guide = self.keys_per_query(window)
            share = (own + guide) / self.tokens.count
            lines.append(
                f"Keys per query with {name} windows: {own:,} + {guide:,} of the guide "
                f"= {own + guide:,} ({share:.2%} of full attention)."
            )
        return "\n".join([*lines, *self.notes])


def make_plan(
    space: LatentSpace,
    width: int,
    height: int,
    seconds: float,
    fps: float,
    proxy_short_side: int,
    temporal_stride: int,
) -> Plan:
    """Round a wish to a legal plan.

    The target's sides become multiples of 16; the proxy keeps the target's aspect with its short
    side as given; frames follow N = r_t (N_g - 1) + 1 with N_g = 4 (F_g - 1) + 1.

    Raises:
        ValueError: a value is outside its range; the message says which and what is allowed.
    """
    notes: list[str] = []
    _require_range("width", width, MIN_SIDE, MAX_SIDE)
    _require_range("height", height, MIN_SIDE, MAX_SIDE)
    _require_range("proxy_short_side", proxy_short_side, MIN_SIDE, MAX_SIDE)
    _require_range("temporal_stride", temporal_stride, 1, MAX_STRIDE)
    _require_range("fps", fps, MIN_FPS, MAX_FPS)
    _require_range("seconds", seconds, MIN_SECONDS, MAX_SECONDS)

    target_width, target_height = _nearest(width, 16), _nearest(height, 16)
    if (target_width, target_height) != (width, height):
        notes.append(
            f"Rounded the size from {width} x {height} to {target_width} x {target_height} "
            "(multiples of 16)."
        )

    unit = space.spatial * space.patch[1]
    short = min(target_width, target_height)
    proxy_short = max(unit, min(_nearest(proxy_short_side, unit), short // unit * unit))
    if proxy_short != proxy_short_side:
        reason = "the target is not larger" if proxy_short_side > short else f"multiples of {unit}"
        notes.append(f"Proxy short side {proxy_short_side} became {proxy_short} ({reason}).")
    proxy_long = max(unit, _nearest(max(target_width, target_height) * proxy_short / short, unit))
    landscape = target_width >= target_height
    proxy_width, proxy_height = (
        (proxy_long, proxy_short) if landscape else (proxy_short, proxy_long)
    )

    per_proxy_latent = space.temporal * temporal_stride
    proxy_latents = _round_half_up(seconds * fps / per_proxy_latent) + 1
    proxy_frames = space.temporal * (proxy_latents - 1) + 1
    frames = temporal_stride * (proxy_frames - 1) + 1
    if abs(frames - 1 - seconds * fps) > 0.5:
        notes.append(
            f"Rounded {seconds:g} s to {frames} frames: with stride {temporal_stride} a video has "
            f"{per_proxy_latent} n + 1 frames."
        )
    if proxy_frames > TRAINED_FRAMES:
        notes.append(
            f"The proxy has {proxy_frames} frames, more than the {TRAINED_FRAMES} that Wan was "
            "trained on: expect repetition, or raise temporal_stride."
        )
    return Plan(
        target_width,
        target_height,
        frames,
        fps,
        temporal_stride,
        proxy_width,
        proxy_height,
        proxy_frames,
        space,
        tuple(notes),
    )


def _require_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value:g}; allowed is {low:g} to {high:g}.")


def _round_half_up(value: float) -> int:
    return math.floor(value + 0.5)


def _nearest(value: float, unit: int) -> int:
    return _round_half_up(value / unit) * unit
