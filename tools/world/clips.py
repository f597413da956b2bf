"""Training clips of the world: rendered once, kept as latents."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .scenes import FPS, SPAN, View, random_scene, random_view, render

WIDTH, HEIGHT, FRAMES = 192, 128, 17
"""Size of the clips that the family is trained on."""


def random_clip(
    rng: np.random.Generator,
    width: int,
    height: int,
    frames: int = FRAMES,
    stride: int = 1,
    wide_share: float = 0.5,
) -> tuple[Tensor, str]:
    """A clip [3, T, H, W] in -1..1 and its caption; `wide_share` of them show the wide view.

    A word for how close it is seen stands in two of three captions.
    """
    scene = random_scene(rng)
    last = (frames - 1) * stride / FPS
    start = rng.uniform(0, max(SPAN - last, 0))
    times = start + np.arange(frames) * stride / FPS
    wide = rng.random() < wide_share
    if wide:
        view = View(width, height)
    else:
        zoom = float(np.exp(rng.uniform(np.log(1.4), np.log(4.5))))
        view = random_view(scene, rng, width, height, zoom, float(times[frames // 2]))
    word = ("wide" if wide else "close") if rng.random() < 0.67 else None
    return render(scene, view, times) * 2 - 1, scene.caption(word)


def random_clips(
    seed: int, count: int, width: int, height: int, frames: int = FRAMES, stride: int = 1
) -> tuple[Tensor, list[str]]:
    """`count` clips [N, 3, T, H, W] in -1..1 and their captions."""
    rng = np.random.default_rng(seed)
    clips = [random_clip(rng, width, height, frames, stride) for _ in range(count)]
    return torch.stack([clip for clip, _ in clips]), [caption for _, caption in clips]


def random_crop(rng: np.random.Generator, side: int, frames: int = 9) -> Tensor:
    """A square clip [3, T, side, side] in -1..1 at the scales of the training clips.

    Half of them are cut from the wide view, where detail is finest. A quarter moves four times as
    fast, as a proxy does.
    """
    scene = random_scene(rng)
    stride = 4 if rng.random() < 0.25 else 1
    start = rng.uniform(0, SPAN - (frames - 1) * stride / FPS)
    times = start + np.arange(frames) * stride / FPS
    closer = 0.0 if rng.random() < 0.5 else rng.uniform(0, np.log(4.5))
    zoom = float(np.exp(closer)) * HEIGHT / side
    view = random_view(scene, rng, side, side, zoom, float(times[frames // 2]))
    return render(scene, view, times) * 2 - 1
