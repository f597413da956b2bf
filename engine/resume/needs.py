"""What a render takes of the disk, known before it is sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..comfyui import server
from ..estimate import cost
from ..families.family import latent_space


@dataclass(frozen=True)
class DiskNeeds:
    """Bytes on the disk of the output folder."""

    answers: int
    """All steps that are not kept yet."""
    video: int
    """The finished video and the frames of its streamed decode, 0 where that is unknown."""
    free: int

    @property
    def spare(self) -> int:
        """What answers leave free: the video's place, unless it lacks that anyway."""
        return self.video if self.video <= self.free else 0

    def problem(self, total: int, limit: int) -> str | None:
        """What will not fit, and what to change; None where all does.

        Args:
            total: bytes of all answers of this render.
            limit: bytes that kept renders may take.
        """
        if total > limit:
            return (
                f"All steps take {cost.size(total)}, disk_limit_gb allows {cost.size(limit)}: "
                "raise it, or the last steps are not kept."
            )
        if self.answers + self.video > self.free:
            return (
                f"Keeping the steps takes {cost.size(self.answers)} and the video about "
                f"{cost.size(self.video)}, {cost.size(self.free)} are free in "
                f"{server.output_folder()}: make room there, or the last steps are not kept."
            )
        return None


def disk_needs(model: Any, latent: Sequence[int], missing: int, answer_bytes: int) -> DiskNeeds:
    """Needs of a render.

    Args:
        latent: shape [B, C, T, h, w]; of another shape, or another model than a Wan, the video's
            need is unknown.
        missing: answers that are not kept yet.
        answer_bytes: of one answer.
    """
    try:
        space = latent_space(model)
    except ValueError:
        space = None
    video = 0
    if space is not None and len(latent) == 5:
        batch, _, frames, height, width = latent
        shown = batch * (space.temporal * (frames - 1) + 1)
        video = cost.video_disk(math.prod((shown, height, width)) * space.spatial**2)
    return DiskNeeds(missing * answer_bytes, video, server.free_disk())
