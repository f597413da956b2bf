"""A student that is right, as far as a linear map can be, before its first step.

Trained from random weights it stayed worse than bicubic up-scaling. Here each layer of the LQ
projection begins as the best linear map to the latent, given the layers before it, while the noise
passes through the transformer beside what they found and is taken off at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from atlasvid.engine.flashvsr.projection import CLIP, IN_FRONT, LowQualityProjection, unshuffle
from einops import rearrange
from torch import Tensor, nn

from .linear import Fit, Ridge, principal
from .vsr import Student
from .vsr_pairs import enlarged

PATCH = 64
"""Numbers of a token's part of the latent: 16 channels of 2 x 2."""
CONSTANT, SPREAD = 6.0, 0.25
"""A channel that is always 6 keeps the norm from making weak and strong inputs alike; the others
have this standard deviation at first, small enough for SiLU to be nearly a line. At 0.04 the first
loss was 0.10 in place of 0.28, but within 50 steps at the recipe's rates it had doubled."""
REST = 16.0
"""Two channels of the transformer, at 16 and -16, do the same for its last norm."""
ROWS = 20_000
"""Of frames, from which the components are found."""

Example = tuple[Tensor, Tensor]
"""A small clip uint8 [3, 4 T + 1, h, w], and its latent [16, T, h / 2, w / 2]."""


@torch.no_grad()
def begin(student: Student, examples: Sequence[Example], seed: int = 0) -> float:
    """Set the student's first weights; what nothing is known of stays small and random.

    Returns:
        the regression's mean squared error, in units of the latent's variance.
    """
    generator = torch.Generator().manual_seed(seed)
    projection = student.projection
    frames = [_frames(small) for small, _ in examples]
    targets = [_patches(latent) for _, latent in examples]
    _first(projection, frames, generator)
    middles = [projection.first(x, range(x.shape[-2])) for x in frames]
    _second(projection, middles, targets, generator)
    features = [projection.second(x, range(x.shape[-2])) for x in middles]
    fit = _fitted([rearrange(x, "1 c t h w -> (t h w) c") for x in features], targets, 2e-5)
    kept = student.net.dim - PATCH - 2
    basis = torch.linalg.eigh(fit.covariance.double())[1].flip(1)[:, :kept].float()
    _tokens(projection.linear_layers[0], fit, basis)
    _ends(student.net, fit, basis, generator)
    _silence(student.net)
    return fit.error


def _frames(small: Tensor) -> Tensor:
    """Enlarged and unshuffled, behind copies of the first: [1, 768, 4 T + 6, h, w]."""
    x = unshuffle(enlarged(small[None])[0])
    return torch.cat([x[:, :, :1].expand(-1, -1, IN_FRONT + CLIP - 1, -1, -1), x], dim=2)


def _patches(latent: Tensor) -> Tensor:
    """[16, T, 2 h, 2 w] -> [T * h * w, 64]."""
    return rearrange(latent.float(), "c t (h p) (w q) -> (t h w) (c p q)", p=2, q=2)


def _fitted(inputs: Sequence[Tensor], targets: Sequence[Tensor], penalty: float) -> Fit:
    ridge = Ridge()
    for x, y in zip(inputs, targets, strict=True):
        ridge.add(x, y)
    return ridge.solve(penalty)


# --- The LQ projection ----------------------------------------------------------------------


def _blank(layer: Any, generator: torch.Generator, spread: float) -> None:
    """Noise that tells channels apart, and in the last channel the constant."""
    layer.weight.copy_(spread * torch.randn(layer.weight.shape, generator=generator))
    layer.bias.zero_()
    layer.weight[-1].zero_()
    layer.bias[-1] = CONSTANT


def _first(
    projection: LowQualityProjection, frames: Sequence[Tensor], generator: torch.Generator
) -> None:
    """The first convolution gives the components of every two frames, each as strong."""
    layer, per_clip = projection.conv1, ROWS // len(frames)
    count = layer.out_channels - 1
    rows = torch.cat([_twos(x, per_clip, generator) for x in frames])
    components, mean = principal(rows, count)
    spread = ((rows - mean) @ components.T).std(0)
    components *= (SPREAD / spread.clamp(min=1e-3 * spread.max()))[:, None]
    _blank(layer, generator, 1e-3)
    layer.weight[:count, :, IN_FRONT:, 1, 1] = rearrange(components, "k (f c) -> k c f", f=2)
    layer.bias[:count] = -components @ mean
    projection.norm1.gamma.fill_(1.0)


def _twos(frames: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Up to `count` rows of what the first convolution's last two taps see: [n, 2 * 768]."""
    rows = rearrange(frames, "1 c (t f) h w -> (t h w) (f c)", f=2)
    return rows[torch.randperm(len(rows), generator=generator)[:count]]


def _second(
    projection: LowQualityProjection,
    middles: Sequence[Tensor],
    targets: Sequence[Tensor],
    generator: torch.Generator,
) -> None:
    """The second convolution gives the latent that its own window tells, each number as strong."""
    layer = projection.conv2
    fit = _fitted([_windows(x) for x in middles], targets, 3e-4)
    weights = fit.weights * (SPREAD / fit.covariance.diagonal().sqrt())
    _blank(layer, generator, 3e-3)
    layer.weight[:PATCH] = weights.T.view(PATCH, *layer.weight.shape[1:])
    layer.bias[:PATCH] = -fit.mean_x @ weights
    projection.norm2.gamma.fill_(1.0)


def _windows(x: Tensor) -> Tensor:
    """What the second convolution sees of [1, C, 2 T + 2, h, w]: [T * h * w, C * 4 * 3 * 3]."""
    padded = nn.functional.pad(x, (1, 1, 1, 1, 0, 0), mode="replicate")
    seen = padded.unfold(2, 4, 2).unfold(3, 3, 1).unfold(4, 3, 1)
    return rearrange(seen, "1 c t h w f i j -> (t h w) (c f i j)")


def _tokens(layer: Any, fit: Fit, basis: Tensor) -> None:
    """Tokens: nothing beside the noise, then the latent in its own components."""
    stop = PATCH + basis.shape[1]
    layer.weight.zero_()
    layer.bias.zero_()
    layer.weight[PATCH:stop] = (fit.weights @ basis).T
    layer.bias[PATCH:stop] = -fit.mean_x @ fit.weights @ basis


# --- The transformer ------------------------------------------------------------------------


def _ends(net: Any, fit: Fit, basis: Tensor, generator: torch.Generator) -> None:
    """Noise in, noise less the latent out, whatever the last norm divides by."""
    embedding, head = net.patch_embedding, net.head.head
    embedding.weight.copy_(1e-3 * torch.randn(embedding.weight.shape, generator=generator))
    embedding.bias.zero_()
    embedding.weight[:PATCH] = torch.eye(PATCH).view(PATCH, *embedding.weight.shape[1:])
    embedding.bias[-2:] = torch.tensor([REST, -REST])
    told = (basis.T @ fit.covariance @ basis).trace()
    spread = ((PATCH + told + 2 * REST**2) / net.dim).sqrt()
    by_head = torch.arange(PATCH).view(16, 4).T.flatten()  # (c, p, q) as the head has it, (p, q, c)
    velocity = torch.zeros(PATCH, net.dim)
    velocity[:, :PATCH] = torch.eye(PATCH)
    velocity[:, PATCH:-2] = -basis
    head.weight.copy_(spread * velocity[by_head])
    head.bias.copy_(-fit.mean_y[by_head])


def _silence(net: Any) -> None:
    """Blocks that add nothing yet, and hardly any modulation."""
    for name, weight in net.named_parameters():
        if name.endswith(("self_attn.o.weight", "cross_attn.o.weight", "ffn.2.weight")):
            weight.zero_()
        elif name.startswith(("time_embedding.2", "time_projection")):
            weight.mul_(0.1)
    net.head.modulation.zero_()
