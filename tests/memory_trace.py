"""Counts the bytes that tensors would occupy, without allocating them."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryTrace(TorchDispatchMode):
    """While active, follows every storage that operations on meta or simulated tensors return.

    Args:
        device: the kind of device whose memory is counted; None for all.
        limit: bytes above which it is out of memory, as an allocator is.
    """

    def __init__(self, device: str | None = None, limit: float = float("inf")) -> None:
        super().__init__()
        self._device = device
        self.limit = limit
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    @property
    def live(self) -> int:
        """Bytes in storages that are still referenced."""
        self._live = {key: item for key, item in self._live.items() if not item[0].expired()}
        return sum(size for _, size in self._live.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and self._device in (None, tensor.device.type):
                storage = tensor.untyped_storage()
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        live = self.live
        if live > self.limit:
            raise torch.OutOfMemoryError(f"{live:,} bytes of {self.limit:,}")
        self.peak = max(self.peak, live)
        return result
