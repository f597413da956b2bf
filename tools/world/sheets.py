"""Contact sheets: one row a clip, a few of its frames."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

SHOWN = 4


def save_sheet(path: Path, videos: Tensor, shown: int = SHOWN) -> None:
    """Write videos [N, 3, T, H, W] in -1..1 as one picture: a row each, `shown` frames across."""
    times = torch.linspace(0, videos.shape[2] - 1, shown).round().long()
    rows = [torch.cat(list(video[:, times].unbind(1)), dim=-1) for video in videos]
    sheet = ((torch.cat(rows, dim=1).clamp(-1, 1) + 1) * 127.5).round().byte()
    Image.fromarray(sheet.permute(1, 2, 0).cpu().numpy()).save(path)
