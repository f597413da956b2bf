"""The family's latent space: a linear, overlapping code of 4 x 8 x 8 patches in 16 numbers.

It is fixed first, so that the VAE's encoder, its decoder and the diffusion model can be trained
side by side: the encoder learns to give these latents, the decoder to invert them.

The first frame is coded as a picture that stands still for four frames, so that latents of a
resting scene agree in all frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from .linear import principal

CHANNELS, TIME, SPACE, REACH = 16, 4, 8, 16
"""Numbers per patch, frames and pixels between patches, pixels that a patch sees."""
BORDER = (REACH - SPACE) // 2


@dataclass(frozen=True)
class LatentCode:
    """Kernels of the code; videos are [N, 3, 4 n + 1, H, W] in -1..1, latents [N, 16, n + 1, h, w].

    Args:
        analysis: [16, 12, 16, 16], the inputs being 4 frames x 3 colours.
        synthesis: [16, 12, 16, 16], the same for the decoding.
        first: [16, 3, 16, 16], the decoding of the first frame.
        bias, first_bias: [12] and [3], added after decoding.
        mean: [16], taken off the latents after encoding.
    """

    analysis: Tensor
    synthesis: Tensor
    first: Tensor
    bias: Tensor
    first_bias: Tensor
    mean: Tensor

    def encode(self, video: Tensor) -> Tensor:
        """Latents of about unit variance."""
        still = video[:, :, :1].expand(-1, -1, TIME, -1, -1)
        stacked = torch.cat([still, video[:, :, 1:]], dim=2)
        n, _, t, h, w = stacked.shape
        frames = stacked.unflatten(2, (-1, TIME)).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12, h, w)
        padded = F.pad(frames, (BORDER,) * 4, mode="replicate")
        latents = F.conv2d(padded, self.analysis, stride=SPACE) - self.mean.view(1, -1, 1, 1)
        return latents.unflatten(0, (n, t // TIME)).transpose(1, 2).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """The video that the linear code alone can give."""
        n, _, t, _, _ = latents.shape
        z = latents + self.mean.view(1, -1, 1, 1, 1)
        options = {"stride": SPACE, "padding": BORDER}
        first = F.conv_transpose2d(z[:, :, 0], self.first, self.first_bias, **options)
        if t == 1:
            return first[:, :, None]
        later = z[:, :, 1:].transpose(1, 2).flatten(0, 1)
        later = F.conv_transpose2d(later, self.synthesis, self.bias, **options)
        later = later.unflatten(0, (n, t - 1)).unflatten(2, (TIME, 3))  # n, t, 4, 3, H, W
        later = later.permute(0, 3, 1, 2, 4, 5).flatten(2, 3)
        return torch.cat([first[:, :, None], later], dim=2)

    def to(self, device: torch.device) -> LatentCode:
        return LatentCode(**{name: value.to(device) for name, value in vars(self).items()})

    def save(self, path: Path) -> None:
        save_file({name: value.contiguous() for name, value in vars(self).items()}, path)

    @classmethod
    def load(cls, path: Path) -> LatentCode:
        return cls(**load_file(path))


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal to noise in dB of videos in -1..1."""
    return -10 * torch.log10(((a - b) ** 2).mean() / 4).item()


def _principal(videos: Tensor) -> tuple[Tensor, Tensor]:
    """Principal components [16, 12, 8, 8] and mean [12] of the patches after the first frame."""
    later = videos[:, :, 1:].unflatten(2, (-1, TIME)).permute(0, 2, 3, 1, 4, 5).flatten(0, 1)
    patches = F.unfold(later.flatten(1, 2), SPACE, stride=SPACE).transpose(1, 2).flatten(0, 1)
    basis, mean = principal(patches, CHANNELS)
    return basis.view(CHANNELS, 12, SPACE, SPACE), mean.view(12, -1).mean(1)


def fit(videos: Tensor, steps: int = 1200, batch: int = 8, seed: int = 0) -> LatentCode:
    """The code that gives back `videos` [N, 3, T, H, W] best, by gradient from their components."""
    torch.manual_seed(seed)
    basis, bias = _principal(videos)
    start = F.pad(basis, (BORDER,) * 4)
    kernels = [start.clone(), start.clone(), start.view(CHANNELS, TIME, 3, REACH, REACH).mean(1)]
    kernels += [bias.clone(), bias.view(TIME, 3).mean(0)]
    for kernel in kernels:
        kernel.requires_grad_()
    optimizer = torch.optim.Adam(kernels, lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    zero = torch.zeros(CHANNELS)
    for _ in range(steps):
        video = videos[torch.randint(len(videos), (batch,))]
        code = LatentCode(*kernels, zero)
        loss = F.mse_loss(code.decode(code.encode(video)), video)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return _normalised(LatentCode(*(k.detach() for k in kernels), zero), videos[:256])


def _normalised(code: LatentCode, videos: Tensor) -> LatentCode:
    """The same code, its latents uncorrelated and scaled between their own and unit variance."""
    z = code.encode(videos).movedim(1, -1).reshape(-1, CHANNELS).double()
    mean = z.mean(0)
    values, vectors = torch.linalg.eigh((z - mean).T @ (z - mean) / len(z))
    values, vectors = values.flip(0).clamp(min=1e-12), vectors.flip(1)
    spread = (values / values[0]) ** 0.25  # the square root of the standard deviation
    scale = spread / spread.pow(2).mean().sqrt() / values.sqrt()
    turn = (vectors * scale).T.float()
    back = (vectors / scale).T.float()
    return LatentCode(
        torch.einsum("ij,jchw->ichw", turn, code.analysis),
        torch.einsum("ij,jchw->ichw", back, code.synthesis),
        torch.einsum("ij,jchw->ichw", back, code.first),
        code.bias,
        code.first_bias,
        turn @ mean.float(),
    )
