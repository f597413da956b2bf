"""Append-only byte stores: in RAM, or in a file that cannot outlive its use.

Plain reads and writes, no memory maps: mapped pages would count as the process's own memory.
"""

import errno
import os
import shutil
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Protocol

import psutil
import torch
from torch import Tensor

from ..device.budget import size

PREFIX = "atlasvid-"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
MAKE_ROOM = (
    "Free some space, start ComfyUI with --temp-directory and --output-directory on a larger disk, "
    "or make a shorter video."
)


class Store(Protocol):
    """Keeps tensors on the CPU and gives them back by number."""

    def append(self, tensor: Tensor) -> int:
        """Stores a copy; returns its number."""
        ...

    def read(self, number: int) -> Tensor:
        """The tensor stored under `number`."""
        ...

    def close(self) -> None:
        """Frees everything."""
        ...


class MemoryStore:
    """Tensors in RAM."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def append(self, tensor: Tensor) -> int:
        self._tensors.append(tensor.to("cpu", copy=True).contiguous())
        return len(self._tensors) - 1

    def read(self, number: int) -> Tensor:
        return self._tensors[number]

    def close(self) -> None:
        self._tensors.clear()


class ScratchFile:
    """Tensors in a temporary file.

    The file goes when the store is closed, collected or the process ends; after a kill,
    `sweep` takes it at the next use, and ComfyUI empties its temp folder at the next start.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        self.path = folder / scratch_name(".scratch")
        self._file = self.path.open("w+b")
        self._lock = Lock()  # one thread appends what another reads back later
        self._records: list[tuple[int, torch.Size, torch.dtype]] = []
        self._end = 0
        self._finalizer = weakref.finalize(self, _close_and_remove, self._file, self.path)

    def append(self, tensor: Tensor) -> int:
        data = tensor.detach().to("cpu").contiguous()
        with self._lock, full_disk_named(self.path.parent, "Keeping parts of the video"):
            self._file.seek(self._end)
            self._file.write(data.reshape(-1).view(torch.uint8).numpy().data)
            self._file.flush()  # here, not when it is closed
            self._records.append((self._end, data.shape, data.dtype))
            self._end += data.nbytes
            return len(self._records) - 1

    def read(self, number: int) -> Tensor:
        offset, shape, dtype = self._records[number]
        tensor = torch.empty(shape, dtype=dtype)
        with self._lock:
            self._file.seek(offset)
            self._file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data)  # type: ignore[attr-defined]
        return tensor

    def close(self) -> None:
        self._finalizer()


def _close_and_remove(file, path: Path) -> None:
    with suppress(OSError):  # what a full disk did not take is not wanted any more
        file.close()
    path.unlink(missing_ok=True)


def scratch_name(suffix: str) -> str:
    """A unique file name that tells which process owns it."""
    started = int(psutil.Process().create_time())
    return f"{PREFIX}{os.getpid()}-{started}-{uuid.uuid4().hex[:8]}{suffix}"


def sweep(folder: Path) -> None:
    """Removes the files in `folder` that processes left behind when they were killed."""
    for path in [*folder.glob(f"{PREFIX}*"), *folder.glob(f".{PREFIX}*")]:
        if not _owner_lives(path.name):
            path.unlink(missing_ok=True)


def _owner_lives(name: str) -> bool:
    try:
        pid, started = map(int, name.lstrip(".").removeprefix(PREFIX).split("-")[:2])
    except ValueError:
        return True  # not one of ours
    try:
        return int(psutil.Process(pid).create_time()) == started
    except psutil.NoSuchProcess:
        return False


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Checks that `folder`'s disk has `needed` bytes free.

    Raises:
        OSError: it has not; the message says how much is needed and what to do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{purpose} needs {size(needed)} of temporary disk space in {folder}, "
            f"but {size(free)} are free. {MAKE_ROOM}"
        )


@contextmanager
def full_disk_named(folder: Path, purpose: str) -> Iterator[None]:
    """A full disk, quota or largest size of a file in an artist's words.

    Raises:
        OSError: in place of the system's, which names hidden files and no way out.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(folder).free
        raise OSError(
            f"{purpose} stopped: the disk of {folder} is full, or its quota is ({size(free)} are "
            f"free). Nothing half-written is left. {MAKE_ROOM}",
        ) from error
