"""Large tensors that are read and overwritten in parts, on the device or in host memory."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from . import copies
from .outbox import Outbox


class Parts(Protocol):
    """A tensor that is used in parts, each named by an index."""

    def read(self, part: Any) -> Tensor:
        """A part on the computing device, only to be read."""
        ...

    def write(self, part: Any, values: Tensor) -> None:
        """Overwrite a part; reads see it once the outbox has settled."""
        ...


class DeviceParts:
    """On the device that computes."""

    def __init__(self, values: Tensor):
        self.values = values

    def read(self, part: Any) -> Tensor:
        return self.values[part]

    def write(self, part: Any, values: Tensor) -> None:
        self.values[part] = values


class HostParts:
    """In host memory: parts stream through the device beside its computing.

    Only those on their way are pinned, as with `tokens.HostTokens`.

    Args:
        outbox: of the computing device; all that is read in a run may share one.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, outbox: Outbox):
        self.values = torch.empty(shape, dtype=dtype)
        self._outbox = outbox

    def read(self, part: Any) -> Tensor:
        values, device = self.values[part], self._outbox.device
        if device.type == "cpu":
            return values
        staged = copies.host_buffer(tuple(values.shape), values.dtype, device)
        return copies.upload(staged.copy_(values), device)

    def write(self, part: Any, values: Tensor) -> None:
        self._outbox.put(values, self.values[part].copy_)
