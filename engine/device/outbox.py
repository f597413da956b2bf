"""Results that leave the device beside its computing."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from . import copies


class Outbox:
    """Copies results to the host on a stream of their own and hands them on in a worker thread.

    At most two wait, so memory stays bounded.

    Args:
        what: the results are, for an error message.
    """

    WAITING = 2

    def __init__(self, device: torch.device, what: str = "a result"):
        self.device = device
        self.what = what
        self._worker = ThreadPoolExecutor(1, "atlasvid-results")
        self._pending: list[Future[None]] = []

    def put(self, values: Tensor, consume: Callable[[Tensor], Any]) -> None:
        """Call consume(copy of `values` in host memory) once the device has made them."""
        self.settle(self.WAITING - 1)
        values = values.contiguous()  # here: the worker's copy would do it in its stream's memory
        ready = copies.Mark(self.device)
        self._pending.append(self._worker.submit(self._take, values, ready, consume))

    def _take(self, values: Tensor, ready: copies.Mark, consume: Callable[[Tensor], Any]) -> None:
        with torch.inference_mode(), ready.after():
            if values.device.type != "cpu":
                shape = tuple(values.shape)
                values = copies.host_buffer(shape, values.dtype, self.device).copy_(values)
            consume(values)

    def settle(self, waiting: int = 0) -> None:
        """Wait until no more than `waiting` results are on their way.

        Raises:
            RuntimeError: an earlier result could not be handed on.
        """
        while len(self._pending) > waiting:
            try:
                self._pending.pop(0).result()
            except Exception as error:  # the work being done now cannot mend it
                raise RuntimeError(f"AtlasVid could not keep {self.what}: {error!r}") from error

    def close(self) -> None:
        """Wait for the worker and let it go."""
        self._worker.shutdown(wait=True)

    def __enter__(self) -> Outbox:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self.settle()
        finally:
            self.close()
