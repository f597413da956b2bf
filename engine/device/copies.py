"""Copies between host and device that run beside the computing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from ..log import log


def release_pinned() -> None:
    """Give pinned host memory that is no longer used back to the system."""
    release = getattr(torch._C, "_host_emptyCache", None)
    if release is not None and torch.cuda.is_available():
        release()


def host_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor in host memory, pinned where `device` copies faster from such."""
    if device.type == "cuda":
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except RuntimeError:  # the system allows no more locked memory: slower, not wrong
            _say_not_pinned()
    return torch.empty(shape, dtype=dtype)


@cache
def _say_not_pinned() -> None:
    log.warning("AtlasVid: no pinned memory left, copies will be slower")


@cache
def _copy_stream(device: torch.device, way: str) -> torch.cuda.Stream:
    """A stream for copies `up` or `down` alone.

    Kept: streams come from a pool of 32, in turn, so new ones would soon be those of other copies,
    and a stream's memory is cached for that stream.
    """
    assert way in ("up", "down")
    return torch.cuda.Stream(device)


def upload(buffer: Tensor, device: torch.device) -> Tensor:
    """A copy of host memory on a device, made beside the work that the device already has."""
    if device.type != "cuda":
        return buffer.to(device, copy=True)
    stream, main = _copy_stream(device, "up"), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        uploaded = buffer.to(device, non_blocking=True)
    main.wait_stream(stream)
    uploaded.record_stream(main)
    return uploaded


def index_on(index: Tensor, device: torch.device) -> Tensor:
    """An index [n] on a device, without waiting for the work that the device already has."""
    if index.device == device:
        return index
    return upload(host_buffer(tuple(index.shape), index.dtype, device).copy_(index), device)


class Mark:
    """A point in a device's work that another thread can wait for."""

    def __init__(self, device: torch.device):
        self.device = device
        self.event = None
        if device.type == "cuda":
            self.event = torch.cuda.Event(blocking=True)  # waiting leaves the core to other threads
            self.event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Return once the device is past the mark."""
        if self.event is not None:
            self.event.synchronize()

    @contextmanager
    def after(self) -> Iterator[None]:
        """Run device work of this thread beside the main stream, once the mark is reached."""
        if self.event is None:
            yield
            return
        stream = _copy_stream(self.device, "down")
        stream.wait_event(self.event)
        with torch.cuda.stream(stream):
            yield


def cpu() -> torch.device:
    """The device whose memory is the host's."""
    return torch.device("cpu")
