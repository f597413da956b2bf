"""A small procedural world: a hot-air balloon drifts over a landscape, at any size, rate and zoom.

Every surface carries noise of many octaves; octaves too fine for a picture fade out, so a close
view shows new detail, as a camera would, and a render at any size is ground truth for that size.
Layers only translate, so the optical flow is known exactly.

Lengths are in heights of the wide view (x to the right, y down, the wide view is centred at
x = 0, y = 0.5); times are in seconds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

FPS = 16.0
SPAN = 5.0
"""Seconds that a story lasts: the balloon passes the middle at half of it."""

BALLOONS = {
    "red": (0.86, 0.12, 0.10),
    "yellow": (0.98, 0.78, 0.10),
    "green": (0.10, 0.62, 0.24),
    "purple": (0.55, 0.18, 0.72),
    "white": (0.93, 0.93, 0.95),
}
MOVES = {"left": -1.0, "right": 1.0}


class Light(NamedTuple):
    """Colours of a time of day."""

    zenith: tuple[float, float, float]
    horizon: tuple[float, float, float]
    sun: tuple[float, float, float]
    cloud: tuple[float, float, float]
    land: tuple[float, float, float]
    """What the colours of the land are multiplied by."""
    balloon: float


LIGHTS = {
    "noon": Light(
        (0.18, 0.46, 0.86), (0.74, 0.88, 0.97), (1.0, 0.98, 0.84), (1.0, 1.0, 1.0),
        (1.0, 1.0, 1.0), 1.0,
    ),
    "dusk": Light(
        (0.34, 0.28, 0.55), (1.0, 0.66, 0.42), (1.0, 0.88, 0.58), (1.0, 0.74, 0.66),
        (0.86, 0.62, 0.60), 0.92,
    ),
    "night": Light(
        (0.03, 0.05, 0.16), (0.16, 0.22, 0.42), (0.96, 0.95, 0.86), (0.30, 0.34, 0.50),
        (0.40, 0.46, 0.70), 0.90,
    ),
}  # fmt: skip
LANDS = {  # (far ridge, near hills dark, near hills bright)
    "hills": ((0.42, 0.56, 0.58), (0.16, 0.36, 0.14), (0.56, 0.64, 0.24)),
    "desert": ((0.70, 0.50, 0.44), (0.62, 0.36, 0.18), (0.93, 0.72, 0.42)),
    "snow": ((0.58, 0.66, 0.78), (0.58, 0.68, 0.82), (0.97, 0.98, 1.0)),
}
VIEWS = ("wide", "close")
WORDS = ("view", "of", "a", "balloon", "drifting", "over", "at")


def words() -> tuple[str, ...]:
    """Every word that a prompt of this world may have."""
    return (*VIEWS, *WORDS, *BALLOONS, *MOVES, *LANDS, *LIGHTS)


@dataclass(frozen=True)
class Scene:
    """What one video shows; the seed decides all that its words do not name."""

    balloon: str
    move: str
    land: str
    light: str
    seed: int
    horizon: float = field(init=False)
    sun: tuple[float, float] = field(init=False)
    radius: float = field(init=False)
    speed: float = field(init=False)
    middle: tuple[float, float] = field(init=False)

    def __post_init__(self) -> None:
        r = np.random.default_rng(self.seed)
        chosen = {
            "horizon": r.uniform(0.64, 0.74),
            "sun": (r.uniform(-0.45, 0.45), r.uniform(0.10, 0.30)),
            "radius": r.uniform(0.17, 0.21),
            "speed": r.uniform(0.09, 0.13),
            "middle": (r.uniform(-0.08, 0.08), r.uniform(0.30, 0.42)),
        }
        for name, value in chosen.items():
            object.__setattr__(self, name, value)

    @property
    def prompt(self) -> str:
        """The prompt of the wide view."""
        return self.caption("wide")

    def caption(self, view: str | None) -> str:
        """What is seen, with or without a word for how close."""
        seen = f"a {self.balloon} balloon drifting {self.move} over {self.land} at {self.light}"
        return f"{view} view of {seen}" if view else seen

    def velocity(self) -> float:
        """Of the balloon along x, heights per second."""
        return MOVES[self.move] * self.speed

    def position(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Centre of the balloon's envelope at times t."""
        x = self.middle[0] + self.velocity() * (t - SPAN / 2)
        return x, self.middle[1] + 0.012 * torch.sin(1.3 * t + self.seed % 7)


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene of random words and seed."""
    words = (
        tuple(options)[rng.integers(len(options))] for options in (BALLOONS, MOVES, LANDS, LIGHTS)
    )
    return Scene(*words, int(rng.integers(1 << 30)))


def scene_of(prompt: str, seed: int) -> Scene:
    """The scene that a prompt names.

    Raises:
        ValueError: a word that this world does not know, or a kind of word that is missing.
    """
    given = prompt.lower().replace(",", " ").replace(".", " ").split()
    unknown = [word for word in given if word not in words()]
    if unknown:
        raise ValueError(f"unknown words: {', '.join(unknown)}; known are {', '.join(words())}.")
    chosen = []
    for kind, options in (
        ("colour", BALLOONS), ("direction", MOVES), ("land", LANDS), ("time of day", LIGHTS),
    ):  # fmt: skip
        found = [word for word in given if word in options]
        if len(found) != 1:
            raise ValueError(
                f"the prompt needs one {kind} of {', '.join(options)}; it has {found}."
            )
        chosen += found
    return Scene(*chosen, seed)


# --- Noise ----------------------------------------------------------------------------------

TILE, TILE_WAVES = 512, 32


@functools.cache
def _tile() -> Tensor:
    """A periodic tile [1, 1, 512, 512] of noise whose wavelengths are about 16 of its pixels."""
    generator = torch.Generator().manual_seed(7)
    spectrum = torch.fft.fft2(torch.randn(TILE, TILE, generator=generator))
    f = torch.fft.fftfreq(TILE) * TILE / TILE_WAVES
    radius = (f[:, None] ** 2 + f[None] ** 2).sqrt()
    tile = torch.fft.ifft2(spectrum * torch.exp(-(((radius - 1) / 0.35) ** 2))).real
    tile = tile / tile.std()
    return torch.nn.functional.pad(tile[None, None], (0, 1, 0, 1), mode="circular")


def _octave(x: Tensor, y: Tensor) -> Tensor:
    """Noise of unit variance and wavelength 1 at x, y (broadcast to one shape [..., H, W])."""
    x, y = torch.broadcast_tensors(x, y)
    grid = torch.stack([x, y], dim=-1) / TILE_WAVES
    grid = (grid - grid.floor()) * 2 - 1
    shape = grid.shape[:-1]
    out = torch.nn.functional.grid_sample(
        _tile(), grid.reshape(1, -1, shape[-1], 2), mode="bilinear", align_corners=True
    )
    return out.reshape(shape)


def noise(
    x: Tensor,
    y: Tensor,
    pixel: float,
    seed: int,
    wavelength: float,
    octaves: int,
    fall: float = 0.55,
) -> Tensor:
    """Sum of octaves from `wavelength` down, about unit variance with all of them.

    Octaves of wavelengths below five pixels are left out, and fade in up to ten, so that nothing
    is finer than what a picture of this size can show.
    """
    r = np.random.default_rng(seed)
    total = torch.zeros(torch.broadcast_shapes(x.shape, y.shape))
    power = 0.0
    for k in range(octaves):
        angle, dx, dy = r.uniform(0, 2 * math.pi), *r.uniform(0, TILE_WAVES, 2)
        length, amplitude = wavelength / 2.0**k, fall**k
        power += amplitude**2
        fade = min(max((length / pixel - 5) / 5, 0.0), 1.0)
        if fade == 0:
            continue
        c, s = math.cos(angle) / length, math.sin(angle) / length
        total = total + fade * amplitude * _octave(c * x - s * y + dx, s * x + c * y + dy)
    return total / math.sqrt(power)


# --- Painting -------------------------------------------------------------------------------


def _colour(rgb: Sequence[float]) -> Tensor:
    return torch.tensor(rgb, dtype=torch.float32).view(3, 1, 1, 1)


def _mix(a: Tensor, b: Tensor, share: Tensor | float) -> Tensor:
    return a + (b - a) * share


def _cover(distance: Tensor, pixel: float) -> Tensor:
    """Coverage of a shape by its signed distance (inside negative), soft over two pixels."""
    return torch.sigmoid(-2.2 * distance / pixel)


@dataclass(frozen=True)
class View:
    """A camera: the picture's size, and which part of the world it shows.

    Args:
        width, height: pixels.
        zoom: 1 shows the wide view's whole height.
        centre: of the picture, in the world.
    """

    width: int
    height: int
    zoom: float = 1.0
    centre: tuple[float, float] = (0.0, 0.5)

    @property
    def pixel(self) -> float:
        """Size of a pixel in the world."""
        return 1.0 / (self.zoom * self.height)

    def coordinates(self) -> tuple[Tensor, Tensor]:
        """x [1, 1, W] and y [1, H, 1] of the pixels' centres."""
        x = self.centre[0] + (torch.arange(self.width) + 0.5 - self.width / 2) * self.pixel
        y = self.centre[1] + (torch.arange(self.height) + 0.5 - self.height / 2) * self.pixel
        return x.view(1, 1, -1).float(), y.view(1, -1, 1).float()


def cloud_velocity(scene: Scene) -> float:
    """Of the clouds along x, heights per second."""
    return 0.25 * scene.velocity()


def _clouds(scene: Scene, view: View, t: Tensor) -> Tensor:
    """Coverage of the clouds [T, H, W]."""
    x, y = view.coordinates()
    x = x - cloud_velocity(scene) * t
    shape = noise(x, y * 2.2, view.pixel, scene.seed + 1, 0.55, 8, fall=0.5)
    high = ((scene.horizon - y) / scene.horizon).clamp(0, 1)
    return torch.sigmoid(3.2 * (shape - 0.55)) * 0.75 * (high * 3).clamp(0, 1)


def _sky(scene: Scene, view: View) -> Tensor:
    """[3, 1, H, W]"""
    x, y = view.coordinates()
    light = LIGHTS[scene.light]
    up = (y / scene.horizon).clamp(0, 1)
    sky = _mix(_colour(light.zenith), _colour(light.horizon), (up**1.4)[None])
    d = ((x - scene.sun[0]) ** 2 + (y - scene.sun[1]) ** 2).sqrt()
    glow = 0.45 if scene.light != "night" else 0.2
    sky = _mix(sky, _colour(light.sun), (glow * torch.exp(-d / 0.10))[None])
    return _mix(sky, _colour(light.sun), _cover(d - 0.05, view.pixel)[None])


def _ridge(scene: Scene, view: View, seed: int, wavelength: float, height: float) -> Tensor:
    """Height [1, 1, W] of a ridge above its base, of about `height`."""
    x, _ = view.coordinates()
    return height * (1 + 0.6 * noise(x, torch.zeros(1), view.pixel, seed, wavelength, 9, fall=0.42))


def _far_land(scene: Scene, view: View) -> tuple[Tensor, Tensor]:
    """Picture [3, 1, H, W] and coverage [1, H, W] of the mountains behind."""
    x, y = view.coordinates()
    light = LIGHTS[scene.light]
    top = scene.horizon - _ridge(scene, view, scene.seed + 2, 0.5, 0.075)
    relief = noise(x + 0.7 * y, y * 1.6, view.pixel, scene.seed + 3, 0.11, 7, fall=0.62)
    rock = _colour(LANDS[scene.land][0]) * _colour(light.land)
    rock = _mix(rock, _colour(light.horizon), 0.35) * (1 + 0.13 * relief)[None]
    return rock, _cover(top - y, view.pixel)


def _near_land(scene: Scene, view: View) -> tuple[Tensor, Tensor]:
    """Picture [3, 1, H, W] and coverage [1, H, W] of the land in front."""
    x, y = view.coordinates()
    light = LIGHTS[scene.light]
    top = scene.horizon + 0.055 - _ridge(scene, view, scene.seed + 4, 0.8, 0.05)
    depth = ((y - top) / 0.3).clamp(0, 1)
    flat = 2.6 - 1.2 * depth  # lengths shrink towards the horizon
    fields = noise(x, (y - top) * flat, view.pixel, scene.seed + 5, 0.20, 8, fall=0.66)
    dark, bright = _colour(LANDS[scene.land][1]), _colour(LANDS[scene.land][2])
    ground = _mix(dark, bright, torch.sigmoid(1.5 * fields + 0.9 - 1.4 * depth)[None])
    ground = _mix(ground * _colour(light.land), _colour(light.horizon), 0.25 * (1 - depth)[None])
    return ground, _cover(top - y, view.pixel)


def _balloon_frame(scene: Scene, view: View, t: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates [T, H, W] in which the envelope is the unit circle at the origin."""
    x, y = view.coordinates()
    bx, by = scene.position(t)
    px, py = (x - bx) / scene.radius, (y - by) / scene.radius
    return torch.broadcast_tensors(px, py)


SHOULDER, MOUTH = 0.35, 1.32
"""Where the envelope stops being a sphere, and where it ends."""


def _envelope_width(py: Tensor) -> Tensor:
    """Half the width of the envelope at height py."""
    round_part = (1 - py.clamp(-1, SHOULDER) ** 2).clamp(min=0).sqrt()
    down = ((py - SHOULDER) / (MOUTH - SHOULDER)).clamp(0, 1)
    return round_part * (1 - 0.82 * down**1.15)


def _balloon(scene: Scene, view: View, t: Tensor) -> tuple[Tensor, Tensor]:
    """Picture [3, T, H, W] and coverage [T, H, W] of the balloon with its basket."""
    px, py = _balloon_frame(scene, view, t)
    pixel = view.pixel / scene.radius
    light = LIGHTS[scene.light]
    width = _envelope_width(py)
    sphere = (px**2 + py**2).sqrt() - 1
    cone = torch.maximum((px.abs() - width) * 0.8, py - MOUTH)
    envelope = torch.where(py < SHOULDER, sphere, cone)
    turn = torch.asin((px / width.clamp(min=1e-3)).clamp(-0.999, 0.999))
    main = _colour(BALLOONS[scene.balloon])
    pale = _mix(main, _colour((1.0, 0.97, 0.9)), 0.55) if scene.balloon != "white" else main * 0.72
    softness = (0.12 + 1.2 * pixel) * 5
    gores = torch.sigmoid(torch.sin(5 * turn + 0.5) / softness * 4)
    cloth = _mix(main, pale, 0.75 * gores[None])
    band = torch.sigmoid((0.11 - (py - 0.30).abs()) / (0.3 * pixel + 0.02))
    cloth = _mix(cloth, main * 0.55, 0.8 * band[None])
    weave = noise(turn, py, pixel, scene.seed + 6, 0.5, 7, fall=0.7)
    side = 1.0 if scene.sun[0] > scene.middle[0] else -1.0
    shade = 0.84 + 0.20 * side * torch.sin(turn) * width - 0.14 * py + 0.055 * weave
    if scene.light == "night":  # the burner lights it from inside
        shade = 0.72 + 0.42 * torch.exp(-(((py - 0.75) / 0.8) ** 2)) + 0.055 * weave
    picture = cloth * shade[None] * light.balloon
    cover = _cover(envelope, pixel)
    ropes = torch.maximum((px.abs() - 0.13).abs() - 0.014, (py - 1.48).abs() - 0.18)
    basket = torch.maximum(px.abs() - 0.19, (py - 1.76).abs() - 0.15)
    wicker = noise(px, py * 2, pixel, scene.seed + 8, 0.12, 6, fall=0.7)
    wood = _colour((0.42, 0.25, 0.12)) * (1 + 0.16 * wicker)[None]
    wood = wood * (light.balloon if scene.light != "night" else 0.75)
    hung = _cover(torch.minimum(ropes, basket), pixel)
    picture = _mix(picture, wood, (hung > cover).float()[None])
    return picture, torch.maximum(cover, hung)


def render(scene: Scene, view: View, times: Sequence[float] | np.ndarray) -> Tensor:
    """The scene as [3, T, H, W] in 0..1 at the given times."""
    t = torch.as_tensor(np.asarray(times), dtype=torch.float32).view(-1, 1, 1)
    light = LIGHTS[scene.light]
    picture = _mix(_sky(scene, view), _colour(light.cloud), _clouds(scene, view, t)[None])
    for layer, cover in (
        _far_land(scene, view),
        _near_land(scene, view),
        _balloon(scene, view, t),
    ):
        picture = _mix(picture, layer, cover[None])
    return picture.clamp(0, 1)


def masks(scene: Scene, view: View, times: Sequence[float] | np.ndarray) -> tuple[Tensor, Tensor]:
    """Where the balloon is seen, and where the sky is: two boolean [T, H, W]."""
    t = torch.as_tensor(np.asarray(times), dtype=torch.float32).view(-1, 1, 1)
    balloon = _balloon(scene, view, t)[1] > 0.5
    land = torch.maximum(_far_land(scene, view)[1], _near_land(scene, view)[1]) > 0.5
    return balloon, ~land & ~balloon


def flow(scene: Scene, view: View, start: float, stop: float) -> Tensor:
    """Exact optical flow [H, W, 2] (x, y) in pixels from time `start` to `stop`.

    Clouds that are half seen move before a sky that does not: there the flow is the clouds'.
    """
    balloon, sky = (mask[0] for mask in masks(scene, view, [start]))
    x, y = scene.position(torch.tensor([start, stop], dtype=torch.float32))
    moved = torch.zeros(view.height, view.width, 2)
    moved[sky] = torch.tensor([cloud_velocity(scene) * float(stop - start), 0.0])
    moved[balloon] = torch.stack([x[1] - x[0], y[1] - y[0]])
    return moved / view.pixel


def random_view(
    scene: Scene, rng: np.random.Generator, width: int, height: int, zoom: float, time: float
) -> View:
    """A closer view, half of the time near the balloon, never outside of the wide view."""
    half_x, half_y = 0.5 * width / height / zoom, 0.5 / zoom
    side = 0.5 * width / height
    if rng.random() < 0.5:
        bx, by = (float(v) for v in scene.position(torch.tensor(time)))
        x, y = bx + rng.normal() * 0.12, by + 0.05 + rng.normal() * 0.15
    else:
        x, y = rng.uniform(-side, side), rng.random()
    x = min(max(x, half_x - side), side - half_x)
    return View(width, height, zoom, (x, min(max(y, half_y), 1 - half_y)))
