"""A latent of any length in a file."""

from __future__ import annotations

import atexit
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..vae.scratch import full_disk_named, require_space, scratch_name, sweep

_mapped: set[Path] = set()
"""Files of this process that could not be removed while their tensors live, as on Windows."""


def _remove_released() -> None:
    """Remove the files whose tensors are gone."""
    for path in tuple(_mapped):
        with suppress(OSError):  # still mapped
            path.unlink(missing_ok=True)
            _mapped.discard(path)


atexit.register(_remove_released)


class LatentFile:
    """Takes a float32 latent [1, C, T, h, w] a few frames at a time, and gives it as one tensor.

    Written by plain writes and mapped when it is whole: its pages never count as memory that
    cannot be given up. The file goes with the tensor, or when writing fails; where the system
    removes no file that is mapped, when the next is made or the process ends.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int, int, int]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        _remove_released()
        require_space(folder, 4 * math.prod(shape), "The latent of this clip")
        self.shape = shape
        self.path = folder / scratch_name(".latent")
        self._file = self.path.open("wb")
        self._kept = False

    def __enter__(self) -> LatentFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()
        if not self._kept:
            self.path.unlink(missing_ok=True)

    def write(self, first: int, latent: Tensor) -> None:
        """Frames `first` and following: [1, C, t, h, w]."""
        _, channels, frames, height, width = self.shape
        plane = 4 * height * width
        data = latent.float().cpu().contiguous()
        with full_disk_named(self.path.parent, "Keeping the latent of this clip"):
            for channel in range(channels):
                self._file.seek((channel * frames + first) * plane)
                self._file.write(data[0, channel].reshape(-1).view(torch.uint8).numpy().data)
            self._file.flush()  # here, not when it is closed

    def tensor(self) -> Tensor:
        """All of it; reading it takes memory only while the system has some."""
        self._file.close()
        flat = torch.from_file(
            str(self.path), shared=False, size=math.prod(self.shape), dtype=torch.float32
        )
        self._kept = True
        _mapped.add(self.path)
        _remove_released()  # the mapping keeps the content alive
        return flat.view(self.shape)
