"""Where a stage of the world's training finds what earlier stages made, and puts what it makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from .latents import LatentCode
from .training import Training

R = TypeVar("R")
SHOWN = 50
"""Steps whose mean loss the progress bar shows."""


@dataclass(frozen=True)
class Work:
    """The work folder of a training, and what was asked for.

    Args:
        output: where the finished files go.
        steps: of the stage, instead of its recipe's.
        start: folder of a finished family to begin with.
        data: share of the drawn data; 1 is what the recipes were measured with.
    """

    folder: Path
    output: Path
    device: torch.device
    steps: int | None = None
    start: Path | None = None
    data: float = 1.0

    @property
    def code(self) -> LatentCode:
        return LatentCode.load(self.folder / "code.safetensors")

    def share(self, count: int, least: int = 1) -> int:
        """How many of `count` drawn things are made."""
        return max(least, round(self.data * count))

    def asked(self, recipe: R) -> R:
        """A recipe with the steps that were asked for."""
        return replace(recipe, steps=self.steps) if self.steps else recipe  # type: ignore[type-var]


class Shown:
    """A progress bar over a training's steps, with its recent loss; pictures now and then.

    Args:
        checkpoint: of the training, beside which its loss curve goes.
        picture: makes samples; called every 250 steps and after the last, with their number.
    """

    EVERY = 250

    def __init__(
        self, training: Training, checkpoint: Path, picture: Callable[[int], None]
    ) -> None:
        self.training, self.picture = training, picture
        self.curve = checkpoint.with_name(f"{checkpoint.stem}_loss.png")
        name = checkpoint.stem.replace("_", " ")
        self.bar: Any = tqdm(total=training.recipe.steps, initial=training.step, desc=name)

    def __enter__(self) -> Shown:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def __call__(self, step: int, loss: float) -> None:
        """After step number `step`."""
        recent = self.training.losses[-SHOWN:]
        self.bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}")
        self.bar.update()
        if (step + 1) % self.EVERY == 0 or step + 1 == self.training.recipe.steps:
            self._draw(step + 1)

    def _draw(self, steps: int) -> None:
        from atlasvid.engine.training.curve import save_losses  # once the pack is loaded

        save_losses(self.training.losses, self.curve)
        self.picture(steps)
