"""Files that are either whole or as before."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path` and put it in place once that is complete.

    Raises:
        RuntimeError: it could not be written; what was at `path` before is still there.
    """
    scratch = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(scratch)
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        kept = f"The earlier {path.name} is intact." if path.exists() else "Nothing was saved."
        raise RuntimeError(
            f"{path} could not be written ({error.strerror or error}). {kept} Free some space "
            "or choose another folder, then resume."
        ) from error
    finally:
        scratch.unlink(missing_ok=True)


def require_writable(folder: Path) -> None:
    """Make a folder, and a file in it for a moment: better now than after hours of training.

    Raises:
        RuntimeError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RuntimeError(
            f"The folder {folder} cannot be written ({error.strerror or error}). Choose another."
        ) from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, written whole or not at all.

    Raises:
        RuntimeError: see `write_whole`.
    """
    content = safetensors.torch.save(dict(tensors), metadata)
    write_whole(path, lambda scratch: scratch.write_bytes(content))
