"""The projection of low-quality frames to tokens (`LQ_proj_in`), streaming and in stripes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..comfyui import models
from ..device.chunks import ChunkSize, in_chunks
from ..vae.cpu import fast_on_cpu

Version = Literal["v1", "v1.1"]
VERSIONS: tuple[Version, ...] = ("v1", "v1.1")
PATCH = 16
CLIP = 4
"""Frames that make one frame of tokens."""
IN_FRONT = 2
"""Frames that a convolution reads before its own."""


class ChannelNorm(nn.Module):
    """Every pixel's channels on a sphere of radius sqrt(C), times gamma."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W]"""
        return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * models.cast(self.gamma, x)


class LowQualityProjection(nn.Module):
    """Two causal convolutions and a linear layer, under the published key names.

    Args:
        widths: channels after the first and second convolution, and of the tokens.
    """

    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__()
        self.widths = widths
        ops = models.layers()
        first, second, tokens = widths
        kernel = {"kernel_size": (4, 3, 3), "stride": (2, 1, 1)}
        self.conv1 = ops.Conv3d(3 * PATCH**2, first, **kernel)
        self.norm1 = ChannelNorm(first)
        self.conv2 = ops.Conv3d(first, second, **kernel)
        self.norm2 = ChannelNorm(second)
        self.linear_layers = nn.ModuleList([ops.Linear(second, tokens)])

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> LowQualityProjection:
        """The projection of the published keys; its widths are those of the shapes."""
        widths = (
            state["conv1.weight"].shape[0],
            state["conv2.weight"].shape[0],
            state["linear_layers.0.weight"].shape[0],
        )
        with torch.device("meta"):
            projection = cls(widths)
        projection.load_state_dict(dict(state), assign=True)
        return projection.requires_grad_(False).eval()

    def first(self, frames: Tensor, rows: range) -> Tensor:
        """Stage 1 on some rows: unshuffled frames [1, 768, 2 + 4, h, w] -> [1, C1, 2, rows, w]."""
        return _stage(self.conv1, self.norm1, frames, rows)

    def second(self, middle: Tensor, rows: range) -> Tensor:
        """Stage 2 on some rows: stage 1's [1, C1, 2 + 2, h, w] -> [1, C2, 1, rows, w]."""
        return _stage(self.conv2, self.norm2, middle, rows)

    def tokens(self, features: Tensor) -> Tensor:
        """[1, C2, n, rows, w] -> [n, rows, w, C]"""
        return self.linear_layers[0](rearrange(features, "1 c n h w -> n h w c"))


def _stage(conv: nn.Module, norm: nn.Module, x: Tensor, rows: range) -> Tensor:
    """Convolution, norm and SiLU for some rows of x, whose edge rows and columns are repeated."""
    height = x.shape[-2]
    first, stop = max(rows.start - 1, 0), min(rows.stop + 1, height)
    edges = (1, 1, first - rows.start + 1, rows.stop + 1 - stop, 0, 0)
    return F.silu(norm(conv(F.pad(x[..., first:stop, :], edges, mode="replicate"))))


def unshuffle(frames: Tensor) -> Tensor:
    """Frames [3, n, H, W] -> [1, 3 * 16 * 16, n, H / 16, W / 16], channels (c, row, column)."""
    return rearrange(frames, "c t (h p) (w q) -> 1 (c p q) t h w", p=PATCH, q=PATCH)


class ProjectionStream:
    """Token frames of a clip in order, with what a version remembers between clips of four frames.

    Before each clip v1 puts the clip's own last two frames; v1.1 those of the clip before it, so
    that only v1.1 remembers anything. The same at both stages.

    Args:
        rows: rows of tokens to convolve at a time; halved when they do not fit.
    """

    def __init__(self, projection: LowQualityProjection, version: str, rows: int) -> None:
        if version not in VERSIONS:
            raise ValueError(f"FlashVSR version {version!r} is none of {', '.join(VERSIONS)}.")
        self.projection = projection
        self.remembers = version == "v1.1"
        self.chunk = ChunkSize(rows)
        self._frames: Tensor | None = None
        self._middle: Tensor | None = None

    def begin(self, first: Tensor) -> None:
        """Read the clip's first frame [3, 1, H, W] in -1 to 1, before all clips of four."""
        if self.remembers:
            still = unshuffle(first.expand(-1, CLIP, -1, -1))
            self._frames = still[:, :, -IN_FRONT:]
            self._middle = self._first(still)

    def tokens(self, clip: Tensor) -> Tensor:
        """A frame of tokens [H / 16, W / 16, C] from the next four frames [3, 4, H, W]."""
        frames = unshuffle(clip)
        middle = self._first(frames)
        before = self._middle if self.remembers else middle[:, :, -IN_FRONT:]
        assert before is not None, "begin comes first"
        tokens = self._second(torch.cat([before, middle], dim=2))
        if self.remembers:
            self._frames, self._middle = frames[:, :, -IN_FRONT:], middle
        return tokens

    def _first(self, frames: Tensor) -> Tensor:
        before = self._frames if self.remembers else frames[:, :, -IN_FRONT:]
        assert before is not None, "begin comes first"
        joined = torch.cat([before, frames], dim=2)
        channels = self.projection.conv1.out_channels
        out = frames.new_empty((1, channels, IN_FRONT, *frames.shape[-2:]))

        def compute(start: int, stop: int) -> None:
            out[..., start:stop, :] = self.projection.first(joined, range(start, stop))

        self._in_stripes(frames.shape[-2], frames, compute)
        return out

    def _second(self, middle: Tensor) -> Tensor:
        height, width = middle.shape[-2:]
        out = middle.new_empty((height, width, self.projection.widths[-1]))

        def compute(start: int, stop: int) -> None:
            features = self.projection.second(middle, range(start, stop))
            out[start:stop] = self.projection.tokens(features)[0]

        self._in_stripes(height, middle, compute)
        return out

    def _in_stripes(self, height: int, like: Tensor, compute: Callable[[int, int], None]) -> None:
        with fast_on_cpu(self.projection, like):
            in_chunks(range(1, height + 1), self.chunk, compute)
