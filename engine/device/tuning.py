"""What was measured of this machine before, in ComfyUI's folder of user files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..comfyui import management, server
from ..log import log


def measurements_file() -> Path:
    """Where measurements are kept."""
    return server.user_folder() / "atlasvid" / "calibration.json"


def read(file: Path | None = None) -> dict[str, dict[str, Any]]:
    """What was measured before; nothing where the file is missing or broken."""
    try:
        found = json.loads((file or measurements_file()).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def remember(key: str, value: dict[str, Any], file: Path | None = None) -> None:
    """Keep a measurement beside the others; where the disk does not take it, say so and go on."""
    file = file or measurements_file()
    try:
        _write(file, json.dumps(read(file) | {key: value}, indent=1) + "\n")
    except OSError as error:  # it is measured again next time
        log.warning("The measurement of this machine could not be kept: %s", error)


def _write(file: Path, text: str) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{file.name}.part")
    try:
        scratch.write_text(text, "utf-8")
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)


def chunk_key(device: torch.device, dim: int) -> str:
    """The key of the fastest chunk for models of a width."""
    return f"chunk, {management.device_name(device)}, {dim}"


def measured_chunk(device: torch.device, dim: int, standard: int) -> int:
    """Tokens past which a larger chunk gains no speed; `standard` where that was not measured."""
    kept = read().get(chunk_key(device, dim))
    found = kept.get("tokens") if isinstance(kept, dict) else None
    return found if isinstance(found, int) and found >= 1_024 else standard
