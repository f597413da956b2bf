"""Trains the world's VAE: a stock Wan 2.1 VAE whose latents are the fixed linear code.

Whole clips go through at once (the stock class goes frame by frame with caches, which gives the
same), in bfloat16 and channels last: three times as fast on a CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .latents import CHANNELS, LatentCode
from .training import KernelRows, adamw, muon, save_whole

HALVES = {"encoder": ("encoder.", "conv1."), "decoder": ("decoder.", "conv2.")}
"""Names of each half's weights."""
DIM = 8
"""Base channels of the VAE (0.9 M parameters; the real one has 96)."""


def _conv(layer: Any, x: Tensor) -> Tensor:
    """A causal convolution over a whole clip."""
    front = layer.kernel_size[0] - 1 if layer.stride[0] == 1 else 0
    if front:
        x = F.pad(x, (0, 0, 0, 0, front, 0))
    return F.conv3d(x, layer.weight, layer.bias, layer.stride, layer.padding)


def _norm(layer: Any, x: Tensor) -> Tensor:
    power = x.float().pow(2).mean(1, keepdim=True)
    return x * torch.rsqrt(power + 1e-12).to(x.dtype) * layer.gamma.to(x.dtype)


def _residual(block: Any, x: Tensor) -> Tensor:
    norm1, _, conv1, norm2, _, _, conv2 = block.residual
    y = _conv(conv1, F.silu(_norm(norm1, x)))
    y = _conv(conv2, F.silu(_norm(norm2, y)))
    return y + (x if isinstance(block.shortcut, nn.Identity) else _conv(block.shortcut, x))


def _attention(block: Any, x: Tensor) -> Tensor:
    t = x.shape[2]
    frames = x.transpose(1, 2).flatten(0, 1)
    q, k, v = (
        part.flatten(2).transpose(1, 2)
        for part in block.to_qkv(_norm(block.norm, frames)).chunk(3, dim=1)
    )
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(frames.shape)
    return x + block.proj(y).unflatten(0, (-1, t)).transpose(1, 2)


def _frames(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer for pictures on every frame."""
    t = x.shape[2]
    y = layer(x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last))
    return y.unflatten(0, (-1, t)).transpose(1, 2)


def _resample(layer: Any, x: Tensor) -> Tensor:
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        later = _conv(layer.time_conv, x[:, :, 1:])
        later = later.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        x = torch.cat([x[:, :, :1], later], dim=2)
    x = _frames(layer.resample, x)
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], _conv(layer.time_conv, x)], dim=2)
    return x


def _run(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        kind = type(layer).__name__
        if kind == "ResidualBlock":
            x = _residual(layer, x)
        elif kind == "AttentionBlock":
            x = _attention(layer, x)
        else:
            x = _resample(layer, x)
    return x


def _head(head: Any, x: Tensor) -> Tensor:
    return _conv(head[2], F.silu(_norm(head[0], x)))


def encode(vae: Any, video: Tensor) -> Tensor:
    """The stock `encode` of a clip [N, 3, 4 n + 1, H, W], with gradients."""
    encoder = vae.encoder
    x = video.contiguous(memory_format=torch.channels_last_3d)
    x = _run(encoder.downsamples, _conv(encoder.conv1, x))
    x = _head(encoder.head, _run(encoder.middle, x))
    return _conv(vae.conv1, x)[:, :CHANNELS]


def decode(vae: Any, latents: Tensor) -> Tensor:
    """The stock `decode` of latents [N, 16, F, h, w], with gradients."""
    decoder = vae.decoder
    x = _conv(vae.conv2, latents.contiguous(memory_format=torch.channels_last_3d))
    x = _run(decoder.middle, _conv(decoder.conv1, x))
    return _head(decoder.head, _run(decoder.upsamples, x))


def initialise(vae: nn.Module, seed: int) -> None:
    """Residual branches begin near zero, so that the first steps train a nearly linear network."""
    torch.manual_seed(seed)
    for name, p in vae.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(p)
        elif p.ndim > 1:
            nn.init.kaiming_uniform_(p, a=math.sqrt(3))
            if name.endswith(("residual.6.weight", "proj.weight")):
                p.data *= 0.1
        else:
            nn.init.zeros_(p)


@dataclass(frozen=True)
class VaeRecipe:
    """How encoder and decoder are trained.

    Args:
        noise: added to the latents that the decoder learns from, so that it forgives the encoder
            and the diffusion model.
    """

    steps: int = 1300
    rate: float = 1.5e-3
    warmup: int = 100
    noise: float = 0.03
    seed: int = 0

    def factor(self, step: int) -> float:
        return min((step + 1) / self.warmup, 0.5 + 0.5 * math.cos(math.pi * step / self.steps))


class VaeTraining:
    """One half of the VAE and its optimizer; saved and loaded as one."""

    def __init__(self, vae: Any, half: str, recipe: VaeRecipe):
        self.vae, self.half, self.recipe = vae, half, recipe
        initialise(vae, recipe.seed)
        own = HALVES[half]
        self.parameters = [p for n, p in vae.named_parameters() if n.startswith(own)]
        self.optimizer = adamw(self.parameters, recipe.rate)
        self.step = 0
        self.losses: list[float] = []

    def save(self, path: Path) -> None:
        state = {
            "vae": self.vae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "losses": self.losses,
        }
        save_whole(state, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.vae.load_state_dict(state["vae"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.losses = state["step"], state["losses"]

    def update(self, video: Tensor, latents: Tensor, generator: torch.Generator) -> float:
        """One step towards the code's latents (encoder) or the video (decoder); its loss."""
        with torch.autocast(video.device.type, torch.bfloat16):
            if self.half == "encoder":
                loss = F.mse_loss(encode(self.vae, video).float(), latents)
            else:
                noise = (
                    torch.randn(latents.shape, generator=generator).to(latents) * self.recipe.noise
                )
                loss = F.mse_loss(decode(self.vae, latents + noise).float(), video)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate * self.recipe.factor(self.step)
        self.optimizer.step()
        self.step += 1
        self.losses.append(loss.item())
        return self.losses[-1]

    @torch.no_grad()
    def restore(self, video: Tensor, code: LatentCode) -> Tensor:
        """`video` as this half of the VAE gives it back, with the linear code as the other half."""
        device = self.parameters[0].device
        if self.half == "decoder":
            return decode(self.vae, code.encode(video).to(device)).float().clamp(-1, 1).cpu()
        return code.decode(encode(self.vae, video.to(device)).float().cpu()).clamp(-1, 1)


class VaeTuning:
    """Both halves together, once each has learned the code: the pixels decide, not the code.

    The encoder is held near the code's latents, which the diffusion model speaks. Half of a batch
    goes through both, half is decoded from the code's own latents, as the diffusion model gives
    them. Kernels learn by Muon: in 550 steps it reaches what AdamW, which fell apart with both
    halves at 8e-4, did not reach with the decoder alone.
    """

    ANCHOR = 0.05
    """Weight of the distance to the code's latents."""

    def __init__(self, vae: Any, recipe: VaeRecipe):
        self.vae, self.recipe = vae, recipe
        ends = ("encoder.conv1.weight", "conv1.weight", "conv2.weight", "decoder.head.2.weight")
        named = dict(vae.named_parameters())
        self.kernels = KernelRows(p for n, p in named.items() if p.ndim > 3 and n not in ends)
        taken = {id(p) for p in self.kernels.kernels}
        self.rest = [p for p in named.values() if id(p) not in taken]
        self.optimizers = [muon(self.kernels.rows, recipe.rate), adamw(self.rest, recipe.rate / 2)]
        self.step = 0

    def loss(self, video: Tensor, latents: Tensor, generator: torch.Generator) -> Tensor:
        half = len(video) // 2
        noise = torch.randn(latents.shape, generator=generator).to(latents) * self.recipe.noise
        with torch.autocast(video.device.type, torch.bfloat16):
            given = encode(self.vae, video).float()
            mixed = torch.cat([given[:half], latents[half:]]) + noise
            pixels = F.mse_loss(decode(self.vae, mixed).float(), video)
            return pixels + self.ANCHOR * F.mse_loss(given, latents)

    def update(self, video: Tensor, latents: Tensor, generator: torch.Generator) -> float:
        """One step on clips [N, 3, T, H, W] and the code's latents of them; its loss."""
        loss = self.loss(video, latents, generator)
        self.vae.zero_grad(set_to_none=True)
        loss.backward()
        self.kernels.take_gradients()
        learned = [p for p in (*self.kernels.rows, *self.rest) if p.grad is not None]
        nn.utils.clip_grad_norm_(learned, 1.0)
        for optimizer, share in zip(self.optimizers, (1.0, 0.5), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = share * self.recipe.rate * self.recipe.factor(self.step)
            optimizer.step()
        self.step += 1
        return loss.item()


def as_stock(vae: dict[str, Tensor]) -> dict[str, Tensor]:
    """One half-precision state dict whose latents have the statistics that ComfyUI expects of Wan.

    The latent format's mean and spread are folded into the 1x1 convolutions next to the latents.
    """
    mean, spread = _wan_statistics()
    state = _with_statistics(vae, mean, spread)
    return {name: value.half().contiguous() for name, value in state.items()}


def from_stock(vae: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `as_stock`, in float32: latents as the code gives them."""
    mean, spread = _wan_statistics()
    state = {name: value.float() for name, value in vae.items()}
    return _with_statistics(state, -mean / spread, 1 / spread)


def _wan_statistics() -> tuple[Tensor, Tensor]:
    """Mean and spread [16] of Wan's latents."""
    import comfy.latent_formats

    space = comfy.latent_formats.Wan21()
    return space.latents_mean.view(-1), space.latents_std.view(-1)


def _with_statistics(vae: dict[str, Tensor], mean: Tensor, spread: Tensor) -> dict[str, Tensor]:
    """The VAE for latents z * spread + mean in place of z."""
    state = {name: value.clone() for name, value in vae.items()}
    weight, bias = state["conv1.weight"], state["conv1.bias"]
    weight[:CHANNELS] *= spread.view(-1, 1, 1, 1, 1)
    bias[:CHANNELS] = bias[:CHANNELS] * spread + mean
    weight, bias = state["conv2.weight"], state["conv2.bias"]
    weight /= spread.view(1, -1, 1, 1, 1)
    bias -= weight[:, :, 0, 0, 0] @ mean
    return state
