"""What was measured of this machine before, in ComfyUI's folder of user files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..comfyui import management, server


def measurements_file() -> Path:
    """Where measurements are kept."""
    return server.user_folder() / "atlasvid" / "calibration.json"


def read(file: Path | None = None) -> dict[str, dict[str, Any]]:
    """What was measured before; nothing where the file is missing or broken."""
    try:
        return json.loads((file or measurements_file()).read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def remember(key: str, value: dict[str, Any], file: Path | None = None) -> None:
    """Keep a measurement beside the others."""
    file = file or measurements_file()
    known = read(file) | {key: value}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(known, indent=1) + "\n", "utf-8")


def chunk_key(device: torch.device, dim: int) -> str:
    """The key of the fastest chunk for models of a width."""
    return f"chunk, {management.device_name(device)}, {dim}"


def measured_chunk(device: torch.device, dim: int, standard: int) -> int:
    """Tokens past which a larger chunk gains no speed; `standard` where that was not measured."""
    found = read().get(chunk_key(device, dim), {}).get("tokens", standard)
    return found if isinstance(found, int) and found >= 1_024 else standard
