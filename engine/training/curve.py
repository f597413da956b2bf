"""The loss curve as a picture."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..comfyui import server
from .files import write_whole

SIZE = (800, 480)
LEFT, TOP, RIGHT, BOTTOM = 70, 20, 20, 40
FAINT, LINE, INK, GRID = "#c9d7ee", "#1f5fbf", "#333333", "#e6e6e6"


def running_mean(losses: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential mean, unbiased at the start."""
    means, total, norm = [], 0.0, 0.0
    for loss in losses:
        total = weight * total + (1 - weight) * loss
        norm = weight * norm + (1 - weight)
        means.append(total / norm)
    return means


def draw_losses(losses: Sequence[float]) -> Image.Image:
    """Losses over steps on a logarithmic axis: each step faint, their running mean dark."""
    picture = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(picture)
    values = [max(loss, 1e-12) for loss in losses if math.isfinite(loss)]
    if not values:
        return picture
    low = math.floor(math.log10(min(values)) * 2) / 2
    high = max(math.ceil(math.log10(max(values)) * 2) / 2, low + 0.5)
    width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM

    def at(step: int, loss: float) -> tuple[float, float]:
        along = step / max(1, len(values) - 1)
        up = (math.log10(loss) - low) / (high - low)
        return LEFT + along * width, TOP + (1 - up) * height

    for i in range(round((high - low) * 2) + 1):
        loss = 10 ** (low + i / 2)
        _, y = at(0, loss)
        draw.line([(LEFT, y), (LEFT + width, y)], fill=GRID)
        draw.text((LEFT - 8, y), f"{loss:.3g}", fill=INK, anchor="rm")
    _line(draw, [at(i, loss) for i, loss in enumerate(values)], FAINT, 1)
    _line(draw, [at(i, loss) for i, loss in enumerate(running_mean(values))], LINE, 2)
    draw.rectangle([LEFT, TOP, LEFT + width, TOP + height], outline=INK)
    draw.text((LEFT, SIZE[1] - 20), "1", fill=INK, anchor="mm")
    draw.text((LEFT + width, SIZE[1] - 20), str(len(values)), fill=INK, anchor="rm")
    draw.text((LEFT + width // 2, SIZE[1] - 20), "step", fill=INK, anchor="mm")
    return picture


def _line(
    draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], fill: str, width: int
) -> None:
    draw.line(points if len(points) > 1 else points * 2, fill=fill, width=width, joint="curve")


def save_losses(losses: Sequence[float], path: Path) -> None:
    """The curve as a PNG.

    Raises:
        RuntimeError: it cannot be written.
    """
    picture = draw_losses(losses)
    write_whole(path, lambda scratch: picture.save(scratch, "PNG"))


def as_image(picture: Image.Image) -> Tensor:
    """A picture as a ComfyUI IMAGE [1, H, W, 3]."""
    return torch.from_numpy(np.asarray(picture).astype(np.float32) / 255)[None]


class LossPreview:
    """A node's progress over a run, with the curve as its preview."""

    SECONDS = 2.0
    """Between two pictures: drawing one takes as long as a short step."""

    def __init__(self, steps: int):
        self._show = server.preview_bar(steps, SIZE[0])
        self._steps = steps
        self._drawn = 0.0

    def show(self, step: int, losses: Sequence[float]) -> None:
        """After a step."""
        picture, now = None, time.monotonic()
        if now - self._drawn > self.SECONDS or step == self._steps:
            picture, self._drawn = draw_losses(losses), now
        self._show(step, picture)
        server.show_progress(f"step {step}/{self._steps}, loss {running_mean(losses)[-1]:.4f}")
