"""Trains a Tiny Conditional decoder of any width: latents and low-quality frames to good frames."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..comfyui import management, media, models
from ..flashvsr.source import Upscale
from ..flashvsr.tc_decoder import BLOCKS, FRAMES, SCALE, TCDecoder, Widths
from ..log import log
from .cache import fingerprint
from .clips import VIDEO_FILES, Clip, Unusable, cut_starts, read_cut
from .curve import save_losses
from .degradation import Degradation
from .files import save_tensors
from .objective import sample_order, step_generator
from .state import TrainingState

KEY = "atlasvid_tc_decoder"
EDGES = 0.5
"""Weight of the differences between neighbouring pixels: an L1 loss alone likes soft edges."""
GRADIENT_NORM = 1.0
RESIDUAL = 0.1
"""MemBlocks begin as nearly nothing, so that the first steps train a shallow network."""


@dataclass(frozen=True)
class DecoderSettings:
    """What the artist chose.

    Raises:
        ValueError: a setting that is impossible.
    """

    steps: int
    widths: Widths = field(default_factory=lambda: Widths(512, 256, 128, 128))
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
        for name in ("width", "height", "side"):
            if getattr(self, name) < SCALE or getattr(self, name) % SCALE:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a multiple of 8.")
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


PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


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
    clips: Sequence[Clip], vae: Any, folder: Path, settings: DecoderSettings, cuts_per_clip: int = 4
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
    if latent.shape[1] != 16 or latent.shape[-1] * SCALE != frames.shape[2]:
        raise ValueError(
            f"The VAE made a latent of {list(latent.shape)}. The decoder reads those of the Wan "
            "2.1 VAE: use wan_2.1_vae."
        )
    return models.wan_latent_in(latent).contiguous()


def decode_clip(decoder: TCDecoder, latents: Tensor, frames: Tensor) -> Tensor:
    """A whole clip at once, with gradients.

    latents [1, 16, T, h, w], normalised; frames [4 T - 3, 3, 8 h, 8 w] -> the same shape.
    """
    padded = torch.cat([frames[:1].expand(FRAMES - 1, -1, -1, -1), frames])
    condition = rearrange(
        padded, "(t f) c (h r) (w q) -> t (c f r q) h w", f=FRAMES, r=SCALE, q=SCALE
    )
    x = decoder.enter(torch.cat([condition, latents[0].transpose(0, 1)], dim=1))
    for level, blocks in enumerate(BLOCKS):
        for number in blocks:
            x = decoder[number](x, torch.cat([torch.zeros_like(x[:1]), x[:-1]]))
        x = decoder.finish(x) if level == len(BLOCKS) - 1 else decoder.rise(level, x)
    return x[FRAMES - 1 :]


def decoder_loss(decoded: Tensor, wanted: Tensor) -> Tensor:
    """L1 of the pixels and of the differences between neighbours, frames [n, 3, H, W]."""
    decoded = decoded.float()
    edges = [F.l1_loss(decoded.diff(dim=axis), wanted.diff(dim=axis)) for axis in (-2, -1)]
    return F.l1_loss(decoded, wanted) + EDGES * (edges[0] + edges[1])


def initialise(decoder: TCDecoder, seed: int) -> None:
    """Random weights for a training from the beginning."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in decoder.named_parameters():
        if weight.ndim == 1:
            weight.data.fill_(0.5 if name.endswith("26.bias") else 0.0)  # grey
            continue
        spread = math.sqrt(2 / weight[0].numel()) * (RESIDUAL if ".conv.4." in name else 1)
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * spread)


class DecoderTrainer:
    """One run: the decoder in `path`, its curve beside it, and its state in `folder`."""

    def __init__(self, settings: DecoderSettings, path: Path, folder: Path) -> None:
        self.settings = settings
        self.path = path
        self.state_path = folder / "state.safetensors"
        self.device = management.compute_device()
        with torch.inference_mode(False):
            self.decoder = TCDecoder(settings.widths, device=self.device)
            initialise(self.decoder, settings.seed)
            self.optimizer = torch.optim.AdamW(
                self.decoder.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99)
            )
        self.samples: Sequence[Path] = ()
        self.losses: list[float] = []
        self.step = 0

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
        latents, shown, wanted = self.sample()
        self.optimizer.zero_grad(set_to_none=True)
        try:
            loss = decoder_loss(decode_clip(self.decoder, latents, shown), wanted)
            loss.backward()
        except Exception as error:
            if not management.is_out_of_memory(error):
                raise
            raise RuntimeError(
                f"The memory ran out at step {self.step + 1}; the state before it is kept. Use a "
                "smaller side, fewer frames or smaller widths."
            ) from None
        norm = torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), GRADIENT_NORM)
        if not (loss.isfinite() and norm.isfinite()):
            raise ValueError(
                f"The loss became {loss.item():g} at step {self.step + 1}; the state before it is "
                "kept. Use a smaller learning rate, or precision fp32."
            )
        self.optimizer.step()
        self.step += 1
        self.losses.append(loss.item())

    def sample(self) -> tuple[Tensor, Tensor, Tensor]:
        """A part of a clip: latents, low-quality frames, and the good ones in [-1, 1]."""
        settings, count = self.settings, len(self.samples)
        generator = step_generator(settings.seed, self.step)
        order = sample_order(count, settings.seed, self.step // count)
        tensors = _read(self.samples[order[self.step % count]])
        side = settings.side // SCALE
        height, width = tensors["latent"].shape[-2:]
        top, left = (
            int(torch.randint(length - side + 1, (), generator=generator))
            for length in (height, width)
        )
        latents = tensors["latent"][..., top : top + side, left : left + side]
        rows = slice(top * SCALE, (top + side) * SCALE)
        cols = slice(left * SCALE, (left + side) * SCALE)
        good = tensors["frames"][:, rows, cols]
        poor = settings.degradation(good, generator)
        upscale = Upscale.to((poor.shape[1], poor.shape[2]), (settings.side, settings.side))
        shown = torch.stack([upscale.resize(frame.float() / 255) for frame in poor])
        wanted = good.movedim(-1, 1).float() / 255 * 2 - 1
        dtype = PRECISIONS[settings.precision]
        given = (latents, shown.float() / 255 * 2 - 1)
        placed = [tensor.to(self.device, dtype) for tensor in given]
        return placed[0], placed[1], wanted.to(self.device)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run to go on exactly."""
        settings = asdict(self.settings)
        for name in ("steps", "save_every"):
            del settings[name]
        return settings | {"samples": [file.stem for file in self.samples]}

    def resume(self) -> int:
        """Takes up the saved state; returns its step."""
        state = TrainingState.load(self.state_path)
        state.require_same(self.identity(), self.state_path)
        self.decoder.load_state_dict(dict(state.adapters))
        self.optimizer.load_state_dict(dict(state.optimizer))
        self.step, self.losses = state.step, list(state.losses)
        return self.step

    def weights(self) -> dict[str, Tensor]:
        """The decoder as its file holds it."""
        state = self.decoder.state_dict()
        return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}

    def save(self) -> None:
        """Writes state, decoder and curve."""
        optimizer, losses = self.optimizer.state_dict(), tuple(self.losses)
        state = TrainingState(self.step, losses, self.weights(), optimizer, self.identity())
        state.save(self.state_path)
        save_tensors(self.path, self.weights(), {KEY: json.dumps({"steps": self.step})})
        save_losses(self.losses, self.path.with_suffix(".png"))

    def save_quietly(self) -> None:
        """`save` while another error is on its way, which must not be hidden."""
        try:
            self.save()
        except RuntimeError as error:
            log.warning("%s", error)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in ("frames", "latent")}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"The encoded clip {path} cannot be read ({error}). Delete it and start again: it will "
            "be encoded anew."
        ) from error
