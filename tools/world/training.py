"""What the world's trainings share: optimizers, averaged weights, checkpoints, the loop."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Recipe(Protocol):
    """What a training asks of its recipe, a dataclass.

    Args:
        ema: decay of the averaged weights, once they are many steps old.
    """

    steps: int
    ema: float
    seed: int

    def rate(self, step: int) -> float:
        """Factor on the learning rates."""
        ...


def save_whole(state: dict[str, Any], path: Path) -> None:
    """Write a file that is never half there, whenever it is stopped."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def muon(
    matrices: Iterable[nn.Parameter], rate: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Muon with steps as large as AdamW's."""
    return torch.optim.Muon(
        matrices, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )


def adamw(parameters: Iterable[Any], rate: float) -> torch.optim.Optimizer:
    """AdamW as the world's trainings use it; groups may have rates of their own."""
    return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)


class KernelRows:
    """Convolution kernels for an optimizer of matrices: the same numbers, a row per output channel.

    Args:
        kernels: contiguous.
    """

    def __init__(self, kernels: Iterable[nn.Parameter]):
        self.kernels = list(kernels)
        self.rows = [nn.Parameter(kernel.data.flatten(1)) for kernel in self.kernels]
        pairs = zip(self.rows, self.kernels, strict=True)
        assert all(rows.data_ptr() == kernel.data_ptr() for rows, kernel in pairs)

    def take_gradients(self) -> None:
        """Those of the kernels, before the optimizer's step."""
        for rows, kernel in zip(self.rows, self.kernels, strict=True):
            assert kernel.grad is not None
            rows.grad = kernel.grad.flatten(1)


class Training:
    """A model, its averaged weights and its optimizers; saved and loaded as one.

    Args:
        model: with its first weights, where it is trained.
        kernels: that an optimizer sees as matrices.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        optimizers: list[torch.optim.Optimizer],
        kernels: KernelRows | None = None,
    ):
        self.model, self.recipe = model, recipe
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.optimizers, self.kernels = optimizers, kernels
        self.base_rates = [[g["lr"] for g in o.param_groups] for o in optimizers]
        self.step = 0
        self.losses: list[float] = []

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "losses": self.losses,
            "recipe": asdict(self.recipe),  # type: ignore[call-overload]
        }
        save_whole(state, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.losses = state["step"], state["losses"]

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Begin with the weights of a finished model."""
        self.model.load_state_dict({name: value.float() for name, value in weights.items()})
        self.average.load_state_dict(self.model.state_dict())

    def descend(self, loss: Tensor) -> float:
        """One step of the optimizers by the loss's gradients; returns the loss."""
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        return self.apply(loss)

    def apply(self, loss: Tensor) -> float:
        """One step of the optimizers by the gradients that are there; returns the loss."""
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if self.kernels:
            self.kernels.take_gradients()
        for optimizer, rates in zip(self.optimizers, self.base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * self.recipe.rate(self.step)
            optimizer.step()
        self.step += 1
        self._follow()
        self.losses.append(loss.item())
        return self.losses[-1]

    @torch.no_grad()
    def _follow(self) -> None:
        decay = min(self.recipe.ema, (self.step + 1) / (self.step + 10))
        pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
        for average, value in pairs:
            average.lerp_(value, 1 - decay)


def train(
    training: Any,
    batch: Callable[[int, torch.Generator], tuple[Tensor, ...]],
    checkpoint: Path,
    on_step: Callable[[int, float], None],
    save_every: float = 120.0,
) -> None:
    """Train to the recipe's last step; checkpoints every so many seconds.

    Args:
        training: a `Training` whose `update` takes what `batch` gives, and a generator.
        batch: of a step, by its number and that generator alone, so that a resumed run goes on as
            one that was never stopped.
    """
    saved = time.monotonic()
    while training.step < training.recipe.steps:
        generator = torch.Generator().manual_seed(training.recipe.seed * 1_000_003 + training.step)
        given = batch(training.step, generator)
        on_step(training.step, training.update(*given, generator))
        if time.monotonic() - saved > save_every:
            training.save(checkpoint)
            saved = time.monotonic()
    training.save(checkpoint)
