"""The target tokens of one video, on the device that computes or in host memory."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from . import copies
from .outbox import Outbox

WORD = torch.int64
"""Rows are gathered and scattered as these: two to three times as fast as 16-bit numbers."""


class Tokens(Protocol):
    """Tokens [F * h * w, C] that blocks read and overwrite by raster index."""

    @property
    def index_device(self) -> torch.device:
        """Where indices must be, so that nothing waits for the computing device."""
        ...

    def read(self, index: Tensor) -> Tensor:
        """Tokens [n, C] at indices [n], on the computing device, as a tensor of its own."""
        ...

    def write(self, index: Tensor, values: Tensor, column: int = 0) -> None:
        """Overwrite tokens, or their numbers from `column` on; visible to reads after `settle`.

        To other indices at once.
        """
        ...

    def settle(self) -> None:
        """Wait until everything written can be read."""
        ...


class DeviceTokens:
    """Tokens on the device that computes."""

    def __init__(self, values: Tensor):
        self.values = values

    @property
    def index_device(self) -> torch.device:
        return self.values.device

    def read(self, index: Tensor) -> Tensor:
        return self.values.index_select(0, index)  # as they are: the head is trained through

    def write(self, index: Tensor, values: Tensor, column: int = 0) -> None:
        place = self.values[:, column : column + values.shape[1]]
        place.view(WORD).index_copy_(0, index, values.contiguous().view(WORD))

    def settle(self) -> None:
        pass


class HostTokens:
    """Tokens in host memory that stream through the device.

    Results go back through an outbox, and uploads have a stream of their own, while the device
    computes the chunk in between.

    Only the chunks on their way are pinned. The tokens are read and written by the CPU, and pinned
    memory is slow to get, handed out in powers of two and scarce on Windows.
    """

    def __init__(self, count: int, dim: int, dtype: torch.dtype, device: torch.device):
        self.values = torch.empty((count, dim), dtype=dtype)
        self._rows = self.values.view(WORD)
        self.device = device
        self._outbox = Outbox(device, "tokens on the host")

    @property
    def index_device(self) -> torch.device:
        return self.values.device

    def read(self, index: Tensor) -> Tensor:
        shape = (len(index), self.values.shape[1])
        gathered = copies.host_buffer(shape, self.values.dtype, self.device)
        torch.index_select(self._rows, 0, index, out=gathered.view(WORD))
        return copies.upload(gathered, self.device)

    def write(self, index: Tensor, values: Tensor, column: int = 0) -> None:
        self._outbox.put(values, partial(self._store, index, column))

    def _store(self, index: Tensor, column: int, values: Tensor) -> None:
        place = self.values[:, column : column + values.shape[1]]
        place.view(WORD).index_copy_(0, index, values.view(WORD))

    def settle(self) -> None:
        self._outbox.settle()

    def close(self) -> None:
        """Wait for the worker and let it go."""
        self._outbox.close()
