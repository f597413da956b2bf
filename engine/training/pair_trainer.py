"""The training loop of FlashVSR's parts, on one card."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..comfyui import management
from ..log import log
from .curve import save_losses
from .files import save_tensors
from .objective import sample_order, step_generator
from .pairs import Pair, PairSettings
from .state import TrainingState
from .trainer import GRADIENT_NORM


class PairTrainer(ABC):
    """One run: a network's weights in `path`, its curve beside them, and its state in `folder`.

    Args:
        network: what is trained, with its first weights, where it is trained.
    """

    KEY: ClassVar[str]
    """Of the recipe in the file's metadata."""
    SMALLER: ClassVar[str]
    """What to try when the memory runs out, in words."""

    def __init__(
        self, settings: PairSettings, network: nn.Module, path: Path, folder: Path
    ) -> None:
        self.settings = settings
        self.network = network
        self.path = path
        self.state_path = folder / "state.safetensors"
        self.device = management.compute_device()
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99)
        )
        self.samples: Sequence[Path] = ()
        self.losses: list[float] = []
        self.step = 0

    @abstractmethod
    def loss(self, pair: Pair, generator: torch.Generator) -> Tensor:
        """Of one pair, which is on the CPU.

        Args:
            generator: of what else is random in this step.
        """

    def run(
        self,
        samples: Sequence[Path],
        resume: bool = True,
        on_step: Callable[[int, list[float]], None] = lambda step, losses: None,
    ) -> int:
        """Train to the last step, from the saved state where there is one; returns its step.

        Raises:
            ValueError: the saved state is of another run, or the loss is not finite.
            RuntimeError: a file cannot be written, or the memory runs out.
        """
        self.samples = samples
        with torch.inference_mode(False):
            resumed_at = self.resume() if resume and self.state_path.is_file() else 0
            try:
                with management.training():
                    while self.step < self.settings.steps:
                        management.raise_if_cancelled()
                        self.learn()
                        if self.step % self.settings.save_every == 0:
                            self.save()
                        on_step(self.step, self.losses)
            except BaseException:
                if self.step > resumed_at:
                    self.save_quietly()
                raise
            self.save()
        return resumed_at

    def learn(self) -> None:
        """One step of the optimizer.

        Raises:
            ValueError: the loss is not finite. Nothing was changed.
            RuntimeError: the memory ran out. Nothing was changed.
        """
        generator = step_generator(self.settings.seed, self.step)
        pair = self.sample(generator)
        self.optimizer.zero_grad(set_to_none=True)
        try:
            loss = self.loss(pair, generator)
            loss.backward()
        except Exception as error:
            if not management.is_out_of_memory(error):
                raise
            raise RuntimeError(
                f"The memory ran out at step {self.step + 1}; the state before it is kept. Use a "
                f"{self.SMALLER}."
            ) from None
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_NORM)
        if not (loss.isfinite() and norm.isfinite()):
            raise ValueError(
                f"The loss became {loss.item():g} at step {self.step + 1}; the state before it is "
                "kept. Use a smaller learning rate, or precision fp32."
            )
        self.optimizer.step()
        self.step += 1
        self.losses.append(loss.item())

    def sample(self, generator: torch.Generator) -> Pair:
        """What this step learns from: every epoch visits each cut once, in an order of its own."""
        count = len(self.samples)
        order = sample_order(count, self.settings.seed, self.step // count)
        return Pair.draw(self.samples[order[self.step % count]], self.settings, generator)

    # --- Files ------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run to go on exactly."""
        settings = asdict(self.settings)
        for name in ("steps", "save_every"):
            del settings[name]
        return settings | {"samples": [file.stem for file in self.samples]}

    def recipe(self) -> dict[str, Any]:
        """What the saved weights say of themselves."""
        return asdict(self.settings) | {"steps": self.step}

    def resume(self) -> int:
        """Takes up the saved state; returns its step."""
        state = TrainingState.load(self.state_path)
        state.require_same(self.identity(), self.state_path)
        self.network.load_state_dict(dict(state.adapters))
        self.optimizer.load_state_dict(dict(state.optimizer))
        self.step, self.losses = state.step, list(state.losses)
        return self.step

    def weights(self) -> dict[str, Tensor]:
        """The network as it is trained, float32."""
        state = self.network.state_dict()
        return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}

    def saved_weights(self) -> dict[str, Tensor]:
        """The network as its file holds it."""
        return self.weights()

    def save(self) -> None:
        """Writes state, weights and curve.

        Raises:
            RuntimeError: one cannot be written; the one before it stays whole.
        """
        optimizer, losses = self.optimizer.state_dict(), tuple(self.losses)
        state = TrainingState(self.step, losses, self.weights(), optimizer, self.identity())
        state.save(self.state_path)
        save_tensors(self.path, self.saved_weights(), {self.KEY: json.dumps(self.recipe())})
        save_losses(self.losses, self.path.with_suffix(".png"))

    def save_quietly(self) -> None:
        """`save` while another error is on its way, which must not be hidden."""
        try:
            self.save()
        except RuntimeError as error:
            log.warning("%s", error)
