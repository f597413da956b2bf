"""An outside judge of frames: the shift-tolerant perceptual distance ST-LPIPS.

Ghildyal and Liu, "Shift-tolerant Perceptual Similarity Metric" (ECCV 2022), with the weights that
its package brings along. Only the evaluation installs it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from torch import Tensor


def load() -> Any:
    """The metric with its own AlexNet, as a module of (frames, frames) in -1..1.

    Raises:
        ImportError: the package is not installed.
    """
    stand_ins = {}
    for name, member in (("IPython", "embed"), ("torchsummary", "summary")):
        if name not in sys.modules:  # imported by the package for debugging alone
            stand_ins[name] = ModuleType(name)
            setattr(stand_ins[name], member, None)
    sys.modules.update(stand_ins)
    try:
        from stlpips_pytorch.stlpips import LPIPS
    finally:
        for name in stand_ins:  # others ask whether there is an IPython
            del sys.modules[name]
    return LPIPS(net="alex", variant="shift_tolerant", verbose=False).requires_grad_(False)


def distance(metric: Any, video: Tensor, truth: Tensor) -> float:
    """Of the middle frames of two videos [T, H, W, 3] in 0..1; 0 for equal ones."""
    middle = slice(len(video) // 2, len(video) // 2 + 1)
    a, b = (frames[middle].movedim(-1, 1) * 2 - 1 for frames in (video, truth))
    return float(metric(a, b))
