"""Trains the world's diffusion model: a stock Wan of 7.6 M parameters on the fixed latents."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .training import Training, adamw, muon

CONFIG = {"dim": 256, "ffn_dim": 896, "num_heads": 2, "num_layers": 6, "text_dim": 4096}
PROXY_LATENT = (5, 16, 24)


@dataclass(frozen=True)
class DitRecipe:
    """How the model is trained.

    Args:
        steps: in all.
        cooldown: of the steps, the last ones, in which the learning rate falls to zero.
        lengths: (share of the steps, latent frames), in order: pictures first, since frames of a
            clip have little new to tell.
        tokens: of a step, in all clips.
        muon_rate, adam_rate: learning rates of the blocks' matrices and of all else.
        shift: of the noise levels' logit-normal distribution.
        caption_dropout: share of clips without words.
        ema: decay of the averaged weights.
    """

    steps: int = 3200
    cooldown: int = 600
    lengths: tuple[tuple[float, int], ...] = ((0.40, 1), (0.08, 3), (0.52, 5))
    tokens: int = 5760
    muon_rate: float = 2e-3
    adam_rate: float = 1e-3
    warmup: int = 100
    shift: float = 2.5
    caption_dropout: float = 0.12
    ema: float = 0.998
    seed: int = 0

    def frames(self, step: int) -> int:
        """Latent frames of the clips of a step."""
        done = 0.0
        for share, frames in self.lengths:
            done += share
            if step < done * self.steps:
                return frames
        return self.lengths[-1][1]

    def rate(self, step: int) -> float:
        """Factor on the learning rates."""
        left = (self.steps - step) / max(self.cooldown, 1)
        return min((step + 1) / self.warmup, 1.0, max(left, 0.0))


def initialise(model: nn.Module, seed: int) -> None:
    """Wan's own initial weights: Xavier matrices, a head that gives zeros."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith("modulation"):
            nn.init.normal_(p, std=p.shape[-1] ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            nn.init.ones_(p)
        elif p.ndim >= 2:
            nn.init.xavier_uniform_(p.flatten(1))
        else:
            nn.init.zeros_(p)
    nn.init.normal_(model.text_embedding[0].weight, std=0.02)
    nn.init.normal_(model.text_embedding[2].weight, std=0.02)
    nn.init.normal_(model.time_embedding[0].weight, std=0.02)
    nn.init.normal_(model.time_embedding[2].weight, std=0.02)
    nn.init.zeros_(model.head.head.weight)


def matmul_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, **_: object) -> Tensor:
    """Attention [B, L, C] by matrix products: 1.8 times as fast as the fused one on short clips."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def optimizers(model: nn.Module, recipe: DitRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        (matrices if name.startswith("blocks.") and p.ndim == 2 else rest).append(p)
    return [muon(matrices, recipe.muon_rate, 0.02), adamw(rest, recipe.adam_rate)]


def noise_levels(n: int, shift: float, generator: torch.Generator) -> Tensor:
    """Flow times [n] of a logit-normal distribution, spread evenly over a batch and shifted."""
    u = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    sigma = torch.sigmoid(math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-0.9999, 0.9999)))
    return shift * sigma / (1 + (shift - 1) * sigma)


def bfloat16_twin(model: nn.Module) -> nn.Module:
    """A copy to compute with: 1.6 times as fast on a CPU as casting at every call.

    The patch embedding stays in full precision, as the stock forward feeds it.
    """
    twin = copy.deepcopy(model).bfloat16()
    twin.patch_embedding.float()
    return twin


class DitTraining(Training):
    """The training of the model, which computes with a twin in half precision."""

    def __init__(self, model: nn.Module, recipe: DitRecipe):
        initialise(model, recipe.seed)
        super().__init__(model, recipe, optimizers(model, recipe))
        self.shift = recipe.shift
        self.twin = bfloat16_twin(model)

    def load(self, path: Path) -> None:
        super().load(path)
        self._copy_to_twin()

    def start_from(self, weights: dict[str, Tensor]) -> None:
        super().start_from(weights)
        self._copy_to_twin()

    @torch.no_grad()
    def _copy_to_twin(self) -> None:
        for mine, its in zip(self.model.parameters(), self.twin.parameters(), strict=True):
            its.copy_(mine)

    def update(self, latents: Tensor, text: Tensor, generator: torch.Generator) -> float:
        """One step on clips [N, 16, F, H, W] with text [N, L, 4096]; returns the loss."""
        sigma = noise_levels(len(latents), self.shift, generator).to(latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        s = sigma.view(-1, 1, 1, 1, 1)
        x = ((1 - s) * latents + s * noise).bfloat16()
        loss = F.mse_loss(self.twin(x, sigma * 1000, text.bfloat16()).float(), noise - latents)
        self.twin.zero_grad(set_to_none=True)
        loss.backward()
        for mine, its in zip(self.model.parameters(), self.twin.parameters(), strict=True):
            mine.grad = its.grad.float()
        given = self.apply(loss)
        self._copy_to_twin()
        return given


@torch.no_grad()
def sample(
    model: nn.Module,
    text: Callable[[str], Tensor],
    prompts: tuple[str, ...],
    device: torch.device,
    steps: int = 16,
    cfg: float = 3.0,
    shift: float = 3.0,
) -> Tensor:
    """Latents [N, 16, F, h, w] of prompts by Euler steps, one noise per prompt, seeded."""
    noise = torch.randn(len(prompts), 16, *PROXY_LATENT, generator=torch.Generator().manual_seed(0))
    x = noise.to(device)
    words = torch.stack([text(prompt) for prompt in prompts]).to(device)
    none = text("").to(device).expand_as(words)
    t = torch.linspace(1, 0, steps + 1)
    sigmas = shift * t / (1 + (shift - 1) * t)
    for sigma, following in itertools.pairwise(sigmas):
        time_step = torch.full((2 * len(x),), float(sigma) * 1000, device=device)
        given, plain = model(torch.cat([x, x]), time_step, torch.cat([words, none])).chunk(2)
        x = x + (following - sigma) * (plain + cfg * (given - plain))
    return x
