"""Pairs to learn FlashVSR's parts from: parts of good clips beside degraded versions of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..comfyui import management, media, models
from ..flashvsr.source import Upscale
from ..flashvsr.tc_decoder import FRAMES, LATENT_CHANNELS, SCALE
from ..log import log
from .cache import fingerprint
from .clips import VIDEO_FILES, Clip, Unusable, cut_starts, read_cut
from .degradation import Degradation
from .files import save_tensors
from .trainer import PRECISIONS

KEY = "atlasvid_pair"


@dataclass(frozen=True)
class PairSettings:
    """What the artist chose for training a part of FlashVSR.

    Raises:
        ValueError: a setting that is impossible.
    """

    unit: ClassVar[int] = SCALE
    """Of which `side` is a multiple."""

    steps: int
    width: int = 1280
    """Of the clips, in pixels, before a part is cut out."""
    height: int = 720
    frames: int = 21
    fps: float = 16.0
    side: int = 256
    """Of the square that a step learns from."""
    degradation: Degradation = field(default_factory=Degradation)
    learning_rate: float = 2e-4
    precision: str = "bf16"
    seed: int = 0
    save_every: int = 250

    def __post_init__(self) -> None:
        if self.frames < 1 or (self.frames - 1) % FRAMES:
            raise ValueError(f"frames is {self.frames}; it must be 1 more than a multiple of 4.")
        for name, unit in (("width", SCALE), ("height", SCALE), ("side", self.unit)):
            value = getattr(self, name)
            if value < unit or value % unit:
                raise ValueError(f"{name} is {value}; it must be a multiple of {unit}.")
        if self.side > min(self.width, self.height):
            raise ValueError(f"side is {self.side}; it must fit into {self.width} x {self.height}.")
        if min(self.steps, self.save_every) < 1:
            raise ValueError("steps and save_every must be at least 1.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; allowed are bf16 and fp32.")

    @property
    def cut(self) -> tuple[int, float, int, int]:
        """Frames, their rate, width and height of what is cut from a clip."""
        return self.frames, self.fps, self.width, self.height

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]


# --- Encoding -------------------------------------------------------------------------------


def clips_without_captions(folder: Path) -> list[Clip]:
    """The videos of a folder.

    Raises:
        ValueError: there is none.
    """
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    videos = [file for file in files if file.suffix.lower() in VIDEO_FILES]
    if not videos:
        raise ValueError(f"There is no video in {folder}. Put clips there: {VIDEO_FILES}.")
    return [Clip(video.name, str(video), "") for video in videos]


def encode_clips(
    clips: Sequence[Clip], vae: Any, folder: Path, settings: PairSettings, cuts_per_clip: int = 4
) -> list[Path]:
    """Files with `frames` uint8 [F, H, W, 3] and `latent` of every cut; those there are kept.

    Raises:
        ValueError: no clip can be used; the message lists why.
    """
    made_from = {"vae": fingerprint(media.vae_weights(vae)), "cut": settings.cut}
    files, skipped = [], []
    for clip in clips:
        try:
            for start in cut_starts(clip, settings.frames / settings.fps, cuts_per_clip):
                management.raise_if_cancelled()
                facts = json.dumps(made_from | {"clip": clip.identity, "start": start})
                name = hashlib.sha256(facts.encode()).hexdigest()[:24]
                file = folder / f"{name}.safetensors"
                if not file.is_file():
                    frames = read_cut(clip, start, *settings.cut)
                    latent = _latent(vae, frames)
                    save_tensors(file, {"frames": frames, "latent": latent}, {KEY: facts})
                files.append(file)
        except Unusable as reason:
            skipped.append(f"{clip.name}: {reason}")
    if not files:
        raise ValueError("No clip can be used:\n" + "\n".join(skipped[:20]))
    for reason in skipped:
        log.info("skipped %s", reason)
    return files


def _latent(vae: Any, frames: Tensor) -> Tensor:
    latent = media.encode_pixels(vae, frames.float() / 255)
    if latent.shape[1] != LATENT_CHANNELS or latent.shape[-1] * SCALE != frames.shape[2]:
        raise ValueError(
            f"The VAE made a latent of {list(latent.shape)}. FlashVSR works on those of the Wan "
            "2.1 VAE: use wan_2.1_vae."
        )
    return models.wan_latent_in(latent).contiguous()


# --- Drawing --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A square part of a cut."""

    latents: Tensor
    """[1, 16, T, side / 8, side / 8], normalised, float32."""
    shown: Tensor
    """The degraded frames as large as the good ones [F, 3, side, side] in -1 to 1."""
    good: Tensor
    """[F, 3, side, side] in -1 to 1."""

    @classmethod
    def draw(cls, file: Path, settings: PairSettings, generator: torch.Generator) -> Pair:
        """A part of an encoded cut and a degraded version of it, both at random.

        Raises:
            ValueError: the file is gone or damaged.
        """
        tensors = _read(file)
        side = settings.side // SCALE
        height, width = tensors["latent"].shape[-2:]
        top, left = (
            int(torch.randint(length - side + 1, (), generator=generator))
            for length in (height, width)
        )
        rows = slice(top * SCALE, (top + side) * SCALE)
        columns = slice(left * SCALE, (left + side) * SCALE)
        good = tensors["frames"][:, rows, columns]
        poor = settings.degradation(good, generator)
        upscale = Upscale.to((poor.shape[1], poor.shape[2]), (settings.side, settings.side))
        shown = torch.stack([upscale.resize(frame.float() / 255) for frame in poor])
        return cls(
            tensors["latent"][..., top : top + side, left : left + side],
            shown.float() / 255 * 2 - 1,
            good.movedim(-1, 1).float() / 255 * 2 - 1,
        )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in ("frames", "latent")}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"The encoded clip {path} cannot be read ({error}). Delete it and start again: it will "
            "be encoded anew."
        ) from error
