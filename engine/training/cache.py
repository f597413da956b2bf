"""Clips as latents and embedded captions, encoded once and kept in safetensors files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..comfyui import management, media, models
from ..families.wan import TEXT_WIDTH
from ..geometry.grid import Grid
from ..geometry.plan import Plan
from ..lora.recipe import DETAIL_STAGES
from .clips import Clip, Unusable, cut_starts, read_cut, resized
from .files import save_tensors
from .selection import Selection, Worth, as_tensor, worth_of

KEY = "atlasvid_sample"
CUTS_PER_CLIP = 4
ALL = Selection()
"""Every cut, as often as any other."""


@dataclass(frozen=True)
class Sample:
    """What one training step learns from. Latents are ComfyUI's, not yet normalised."""

    target: Tensor | None
    """[1, C, T, H, W], in the stages of the detail branch."""
    guide: Tensor
    """[1, C, F_g, H_g, W_g]; in stage proxy this is what is learned."""
    text: Tensor
    """[1, L, C]"""


@dataclass(frozen=True)
class Dataset:
    """Cached samples, and what was left out."""

    files: tuple[Path, ...]
    empty_text: Path
    skipped: tuple[str, ...]
    """`name: reason`, one per clip or cut."""
    chosen: tuple[str, ...] = ()
    """What was asked of the cuts and what each has, where something was."""

    def sample(self, index: int) -> Sample:
        tensors = _read(self.files[index])
        return Sample(tensors.get("target"), tensors["guide"], tensors["text"])

    def without_words(self) -> Tensor:
        """The embedding of no caption [1, L, C]."""
        return _read(self.empty_text)["text"]

    def report(self) -> str:
        """How many samples there are, and what was skipped and why."""
        lines = [f"{len(self.files)} samples, {len(self.skipped)} clips or cuts skipped."]
        lines += (f"skipped {reason}" for reason in self.skipped)
        return "\n".join([*lines, *self.chosen])


class LatentCache:
    """Encodes clips for one plan and stage with one VAE and text encoder.

    A sample's file is named by everything that it was made from, and checked when it is found, so
    a run that was interrupted goes on where it stopped and nothing stale is ever used.
    """

    def __init__(self, folder: Path, plan: Plan, stage: str, vae: Any, text_encoder: Any):
        self.folder = folder
        self.plan = plan
        self.kind = "guide" if stage in DETAIL_STAGES else stage
        self.vae = vae
        self.text_encoder = text_encoder
        self.made_from = {
            "plan": {k: v for k, v in asdict(plan).items() if k != "notes"},
            "stage": self.kind,  # of both streams of the detail branch alike
            "vae": fingerprint(media.vae_weights(vae)),
            "text encoder": text_fingerprint(text_encoder),
        }

    def build(
        self,
        clips: Sequence[Clip],
        cuts_per_clip: int = CUTS_PER_CLIP,
        on_progress: Callable[[int, int, str], None] = lambda done, total, name: None,
        selection: Selection = ALL,
    ) -> Dataset:
        """Encode what is not there yet.

        Args:
            selection: what is asked of a cut; one that counts more often is listed more often.

        Raises:
            ValueError: no clip can be used, the message lists why; or VAE or text encoder belong to
                another model.
        """
        empty_text = self._empty_text()
        files: list[Path] = []
        worths: list[Worth] = []
        names: list[str] = []
        skipped: list[str] = []
        for done, clip in enumerate(clips):
            management.raise_if_cancelled()
            on_progress(done, len(clips), clip.name)
            try:
                starts = cut_starts(clip, self.plan.frames / self.plan.fps, cuts_per_clip)
            except Unusable as reason:
                skipped.append(f"{clip.name}: {reason}")
                continue
            for start in starts:
                name = f"{clip.name} from {start:.1f} s"
                try:
                    if selection.is_asked:
                        worth = self.worth(clip, start)
                        selection.require(worth)
                        worths.append(worth)
                    files.append(self.sample_file(clip, start))
                    names.append(name)
                except Unusable as reason:
                    skipped.append(f"{name}: {reason}")
        on_progress(len(clips), len(clips), "")
        if not files:
            reasons = "\n".join(skipped[:20])
            raise ValueError(f"None of the {len(clips)} clips can be used:\n{reasons}")
        return _chosen(files, names, worths, selection, empty_text, tuple(skipped))

    def sample_file(self, clip: Clip, start: float) -> Path:
        """The file of one cut, made where it is missing, damaged or of something else.

        Raises:
            Unusable: the clip cannot be used.
            RuntimeError: the file cannot be written.
        """
        facts = self.made_from | {
            "clip": clip.identity,
            "start": start,
            "caption": clip.caption,
        }
        path = self._path(facts)
        if not self._is_whole(path, facts):
            save_tensors(path, self._encode(clip, start), {KEY: json.dumps(facts)})
        return path

    def worth(self, clip: Clip, start: float) -> Worth:
        """What a cut has to teach, measured once and kept in a file.

        Raises:
            Unusable: the clip cannot be used.
            RuntimeError: the file cannot be written.
        """
        plan = {k: v for k, v in asdict(self.plan).items() if k != "notes"}
        facts = {"worth of": clip.identity, "start": start, "plan": plan, "stage": self.kind}
        path = self._path(facts)
        if not _header_is(path, facts):
            found = worth_of(*self._looked_at(clip, start))
            save_tensors(path, {"worth": as_tensor(found)}, {KEY: json.dumps(facts)})
        return Worth(*_read(path)["worth"].tolist())

    def _looked_at(self, clip: Clip, start: float) -> tuple[Tensor, tuple[int, int]]:
        """The frames that are learned from, and the size above which detail counts in them."""
        plan = self.plan
        if self.kind == "guide":
            frames = read_cut(clip, start, plan.frames, plan.fps, plan.width, plan.height)
            return frames, (plan.proxy_width, plan.proxy_height)
        size = plan.proxy_width, plan.proxy_height
        frames = read_cut(clip, start, plan.proxy_frames, plan.proxy_fps, *size)
        return frames, (size[0] // 2, size[1] // 2)

    def _encode(self, clip: Clip, start: float) -> dict[str, Tensor]:
        plan = self.plan
        size = plan.proxy_width, plan.proxy_height
        tensors = {}
        if self.kind == "guide":
            frames = read_cut(clip, start, plan.frames, plan.fps, plan.width, plan.height)
            tensors["target"] = self._latent(frames, plan.latent)
            proxy = resized(frames[:: plan.temporal_stride], *size)
        else:
            proxy = read_cut(clip, start, plan.proxy_frames, plan.proxy_fps, *size)
        tensors["guide"] = self._latent(proxy, plan.proxy_latent)
        tensors["text"] = self._text(clip.caption)
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def _latent(self, frames: Tensor, expected: Grid) -> Tensor:
        latent = media.encode_pixels(self.vae, frames.float() / 255)
        shape = (1, self.plan.space.channels, *expected)
        if tuple(latent.shape) != shape:
            raise ValueError(
                f"The VAE made a latent of {tuple(latent.shape)}, the model works with {shape}. "
                "Connect the VAE that belongs to the model (Wan 2.1, or Wan 2.2 for TI2V-5B)."
            )
        return latent

    def _empty_text(self) -> Path:
        facts = {"text encoder": self.made_from["text encoder"], "caption": ""}
        path = self._path(facts)
        if not _header_is(path, facts):
            save_tensors(path, {"text": self._text("").contiguous()}, {KEY: json.dumps(facts)})
        return path

    def _text(self, caption: str) -> Tensor:
        """[1, L, C]"""
        text = models.encode_text(self.text_encoder, caption)
        if text.shape[-1] != TEXT_WIDTH:
            raise ValueError(
                f"The text encoder makes {text.shape[-1]} numbers per word, Wan takes "
                f"{TEXT_WIDTH}. Use the one that belongs to it: UMT5-XXL, loaded with the type wan."
            )
        return text

    def _path(self, facts: dict) -> Path:
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
        return self.folder / f"{name}.safetensors"

    def _is_whole(self, path: Path, facts: dict) -> bool:
        """Whether a file holds a sample of these facts, of the plan's sizes and finite."""
        if not _header_is(path, facts):
            return False
        try:
            tensors = _read(path)
        except ValueError:
            return False
        sizes = {"guide": self.plan.proxy_latent}
        if self.kind == "guide":
            sizes["target"] = self.plan.latent
        return all(tensor.isfinite().all() for tensor in tensors.values()) and all(
            name in tensors and tensors[name].shape[2:] == torch.Size(size)
            for name, size in sizes.items()
        )


def _chosen(
    files: list[Path],
    names: list[str],
    worths: list[Worth],
    selection: Selection,
    empty_text: Path,
    skipped: tuple[str, ...],
) -> Dataset:
    """The dataset of what was selected. Six parameters: it is all that `build` found."""
    if not selection.is_asked:
        return Dataset(tuple(files), empty_text, skipped)
    repeats = selection.repeats(worths)
    listed = [file for file, count in zip(files, repeats, strict=True) for _ in range(count)]
    rows = zip(names, worths, repeats, strict=True)
    chosen = [f"{name}: {worth}, counts {count} times" for name, worth, count in rows]
    return Dataset(tuple(listed), empty_text, skipped, (selection.describe(), *chosen))


def _header_is(path: Path, facts: dict) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(KEY) == json.dumps(facts)
    except (SafetensorError, OSError):
        return False


def _read(path: Path) -> dict[str, Tensor]:
    """Raises ValueError for a file that is gone or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"The cached sample {path} cannot be read ({error}). Start again: it will be encoded "
            "anew."
        ) from error


PROBE = "a view"
"""Words that every text encoder takes, the tiny world's too."""


def fingerprint(state: dict[str, Tensor]) -> str:
    """A short name for a model's weights, from their names, shapes and first values."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        if tensor.is_floating_point():
            values = tensor.detach().flatten()[:64].float().cpu().contiguous()
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def file_fingerprint(path: str | Path) -> str:
    """A short name for a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def text_fingerprint(encoder: Any) -> str:
    """A short name for a text encoder; one without weights is known by what it makes of a word."""
    model = getattr(encoder, "cond_stage_model", None)
    if model is None:
        return fingerprint({"": models.encode_text(encoder, PROBE)})
    return fingerprint(model.state_dict())
