"""What the loader hands to the nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class FlashVSR:
    """The parts of one FlashVSR version, which belong together.

    Args:
        model: MODEL (a ModelPatcher) of the streaming DiT.
        projection: ModelPatcher of the LQ projection.
        prompt: the one prompt that it was trained with, [1, 512, 4096].
        tc_decoder: ModelPatcher of a `TCDecoder`, or None where its file is absent.
        version: "v1" or "v1.1"; the files themselves do not tell.
    """

    model: Any
    projection: Any
    prompt: Tensor
    tc_decoder: Any | None
    version: str
