"""What the world's FlashVSR learns from: large drawn clips beside small ones, in files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .latents import LatentCode
from .scenes import FPS, SPAN, random_scene, random_view, render
from .training import save_whole

SCALE = 4
LOOK_AHEAD = 4
"""Frames that are read beyond those whose latents are made."""
SEED = 50_000


@dataclass(frozen=True)
class PairSizes:
    """How much is drawn, and how large.

    Args:
        shards: files; the first is held out from training.
        clips: in a file.
        side: of a large clip in pixels, whole blocks of 128: 256 are 2 x 2 blocks.
        frames: that are read, 8 m + 1: 33 are read for 8 latent frames, 29 frames.
    """

    shards: int = 40
    clips: int = 10
    side: int = 256
    frames: int = 33


def random_pair(rng: np.random.Generator, code: LatentCode, sizes: PairSizes) -> tuple[Tensor, ...]:
    """A part of a large picture [3, F, side, side], and it at a quarter of its size, both uint8.

    The small one is what an artist gives: drawn frames or, in half of the clips, frames that went
    through the latent space, with a little noise.
    """
    scene = random_scene(rng)
    start = rng.uniform(0, SPAN - (sizes.frames - 1) / FPS)
    times = start + np.arange(sizes.frames) / FPS
    zoom = float(np.exp(rng.uniform(np.log(1.4), np.log(4.5))))
    view = random_view(scene, rng, sizes.side, sizes.side, zoom, float(times[len(times) // 2]))
    large = render(scene, view, times)
    small = F.interpolate(large.movedim(1, 0), scale_factor=1 / SCALE, mode="area").movedim(0, 1)
    if rng.random() < 0.5:
        small = (code.decode(code.encode(small[None] * 2 - 1))[0] + 1) / 2
    small = small + float(rng.uniform(0, 0.02)) * torch.randn(
        small.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**31)))
    )
    return as_bytes(large), as_bytes(small)


def as_bytes(video: Tensor) -> Tensor:
    """0..1 to uint8."""
    return (video * 255).round().clamp(0, 255).byte()


def as_pixels(video: Tensor) -> Tensor:
    """uint8 to -1..1."""
    return video.float() / 127.5 - 1


def enlarged(small: Tensor) -> Tensor:
    """[N, 3, F, h, w] uint8 -> up-scaled by four in -1..1, as PIL's bicubic to one grey level."""
    n = len(small)
    frames = small.movedim(2, 1).flatten(0, 1)
    large = F.interpolate(frames, scale_factor=SCALE, mode="bicubic", antialias=True)
    return as_pixels(large.unflatten(0, (n, -1)).movedim(1, 2))


class Shard(NamedTuple):
    """Clips of one file.

    Args:
        large: uint8 [N, 3, F - 4, side, side], the frames that the latents stand for.
        small: uint8 [N, 3, F, side / 4, side / 4].
        latents: [N, 16, T, side / 8, side / 8] of the large ones, in half precision.
    """

    large: Tensor
    small: Tensor
    latents: Tensor


def render_shard(path: Path, number: int, code: LatentCode, sizes: PairSizes) -> None:
    """One file of clips, the same for the same number."""
    rng = np.random.default_rng(SEED + number)
    pairs = [random_pair(rng, code, sizes) for _ in range(sizes.clips)]
    large = torch.stack([pair[0] for pair in pairs])[:, :, :-LOOK_AHEAD].contiguous()
    latents = torch.cat([code.encode(as_pixels(clip[None])) for clip in large]).half()
    small = torch.stack([pair[1] for pair in pairs])
    save_whole(Shard(large, small, latents)._asdict(), path)


def render_shards(folder: Path, code: LatentCode, sizes: PairSizes) -> None:
    """All files; those that are there are kept."""
    folder.mkdir(exist_ok=True)
    for number in tqdm(range(sizes.shards), desc="pairs"):
        path = folder / f"{number:04d}.pt"
        if not path.exists():
            render_shard(path, number, code, sizes)


def shard_paths(folder: Path) -> list[Path]:
    """Of the held-out file, then those to train with.

    Raises:
        FileNotFoundError: there are fewer than two.
    """
    paths = sorted(folder.glob("*.pt"))
    if len(paths) < 2:
        raise FileNotFoundError(f"{folder} holds {len(paths)} files of pairs: run stage pairs")
    return paths


def read_shard(path: Path) -> Shard:
    """Mapped, not read: what is not looked at takes no memory."""
    return Shard(**torch.load(path, mmap=True, weights_only=True))
