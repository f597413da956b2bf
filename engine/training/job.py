"""A training job from clips to a LoRA in ComfyUI's folders: what the node and the command share."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..comfyui import server
from ..geometry.plan import Plan
from ..log import log
from .cache import ALL, CUTS_PER_CLIP, Dataset, LatentCache
from .clips import Clip
from .files import require_writable
from .selection import Selection
from .trainer import ONE_CARD, Cards, Trainer, TrainResult, TrainSettings, require_trainable

LONGEST_NAME = 200
"""Bytes; with `.safetensors` and what is added while it is written, file systems allow 255."""


@dataclass(frozen=True)
class Job:
    """Where a training run keeps its files.

    Args:
        loras: folder for the LoRA and its curve.
        work: folder for latents, states and the LoRAs of earlier steps.
        name: of the LoRA and the run.

    Raises:
        ValueError: a name that is no file name.
    """

    loras: Path
    work: Path
    name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w .+-]*", self.name):
            raise ValueError(
                f"name is {self.name!r:.80}; use letters, digits, spaces and . + - _ only, "
                "beginning with a letter or digit."
            )
        if len(self.name.encode()) > LONGEST_NAME:
            raise ValueError(
                f"name is {len(self.name.encode())} bytes long; at most {LONGEST_NAME} make a file "
                "name everywhere. Choose a shorter one."
            )

    @property
    def path(self) -> Path:
        """The LoRA."""
        return self.loras / f"{self.name}.safetensors"

    @property
    def run_folder(self) -> Path:
        return self.work / self.name

    @property
    def cache_folder(self) -> Path:
        """Shared by all runs."""
        return self.work / "latents"

    def require_own_name(self) -> None:
        """Refuse to replace a LoRA that no run of this name has made.

        Raises:
            ValueError: names the file.
        """
        if self.path.exists() and not (self.run_folder / "state.safetensors").exists():
            raise ValueError(
                f"{self.path} exists and is of no run in {self.run_folder}. Choose another name, "
                "or move it away."
            )


def comfyui_job(name: str) -> Job:
    """A job in ComfyUI's own folders."""
    work = Path(server.output_folder()) / "atlasvid_training"
    return Job(Path(server.lora_folder()), work, name)


def train(
    job: Job,
    model: Any,
    text_encoder: Any,
    vae: Any,
    plan: Plan,
    settings: TrainSettings,
    clips: Sequence[Clip],
    *,
    resume: bool = True,
    cuts_per_clip: int = CUTS_PER_CLIP,
    cards: Cards = ONE_CARD,
    selection: Selection = ALL,
    on_clip: Callable[[int, int, str], None] = lambda done, total, name: None,
    on_step: Callable[[int, list[float]], None] = lambda step, losses: None,
) -> tuple[TrainResult, Dataset]:
    """Encode what is not cached yet, then train.

    Args:
        selection: which cuts are learned from, and how often.
        resume: go on from the state of an earlier run of the same name; else it is replaced.
        on_clip: called with clips done, clips in all and the next one's name.
        on_step: called with the step and all losses.

    Raises:
        ValueError: nothing to train on, or settings that do not fit; says what to change.
        RuntimeError: a file cannot be written, or a package is missing.
    """
    job.require_own_name()
    require_trainable(model, plan, settings)
    for folder in (job.loras, job.run_folder, job.cache_folder):
        require_writable(folder)
    cache = LatentCache(job.cache_folder, plan, settings.stage, vae, text_encoder)
    if cards.index:  # the first process encodes, the others find it done
        cards.wait()
        dataset = cache.build(clips, cuts_per_clip, selection=selection)
    else:
        dataset = cache.build(clips, cuts_per_clip, on_clip, selection)
        cards.wait()
    log.info("%s", dataset.report())
    trainer = Trainer(model, plan, settings, job.path, job.run_folder, cards)
    return trainer.run(dataset, resume, on_step), dataset
