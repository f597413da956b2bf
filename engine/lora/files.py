"""LoRA files, in the layouts of peft, diffusers, ComfyUI and kohya."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .recipe import Recipe

FACTOR = re.compile(
    r"^(?P<layer>.+?)[._]lora(?:_linear_layer)?[._](?P<side>A|B|down|up)"
    r"(?:\.(?!weight$)\w+)?(?:\.weight)?$"
)


BROKEN = "The file is broken: download it again, or save it anew with the tool that made it."


@dataclass(frozen=True)
class LowRank:
    """The change of one linear layer: scale * up @ down."""

    down: Tensor
    """[rank, in]"""
    up: Tensor
    """[out, rank]"""
    scale: float
    """alpha / rank"""

    def to(self, like: Tensor) -> LowRank:
        """The same on the device and in the dtype of `like`."""
        return LowRank(self.down.to(like), self.up.to(like), self.scale)


# --- Files ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as read from disk, not yet matched with a model."""

    name: str
    changes: dict[str, LowRank]
    """By the file's own names of layers."""
    unread: tuple[str, ...]
    """Keys that are no part of a low-rank pair (DoRA scales, full differences, ...)."""
    recipe: Recipe | None


def read_lora(path: str | Path) -> LoraFile:
    """Read a LoRA in peft, diffusers or ComfyUI (also kohya) layout.

    Raises:
        ValueError: not a safetensors file, unreadable, or without any low-rank pair.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path.name} is not a .safetensors file. Other formats can run code when they are "
            "opened and are not read; convert it with the tool that made it."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} cannot be read ({error}). Download it again.") from error
    changes, unread = pairs_of(tensors, default_alpha(path, metadata), path.name)
    if not changes:
        raise ValueError(
            f"{path.name} holds no LoRA: none of its {len(tensors)} tensors is half of a low-rank "
            "pair (lora_A/lora_B, lora_down/lora_up)."
        )
    return LoraFile(path.name, changes, unread, Recipe.from_metadata(metadata))


def pairs_of(
    tensors: Mapping[str, Tensor], alpha: float | None = None, file: str = "The LoRA"
) -> tuple[dict[str, LowRank], tuple[str, ...]]:
    """Low-rank pairs by layer name, and the keys that belong to none.

    Args:
        alpha: for layers without an `.alpha` of their own; None means alpha = rank.

    Raises:
        ValueError: a pair of rank 0, or numbers that are not finite.
    """
    halves: dict[str, dict[str, str]] = {}
    for key, tensor in tensors.items():
        if (match := FACTOR.match(key)) and tensor.ndim == 2:
            side = "down" if match["side"] in ("A", "down") else "up"
            halves.setdefault(match["layer"], {})[side] = key
    changes, used = {}, set()
    for layer, sides in halves.items():
        if len(sides) < 2 or f"{layer}.dora_scale" in tensors:
            continue
        down, up = tensors[sides["down"]], tensors[sides["up"]]
        if len(down) != up.shape[1]:
            continue
        used.update(sides.values())
        own = f"{layer}.alpha"
        given = alpha
        if own in tensors:
            used.add(own)
            given = _single(tensors[own], f"{file}: {own}")
        rank = len(down)
        if rank == 0:
            raise ValueError(f"{file}: {layer} has rank 0 and changes nothing. {BROKEN}")
        if not (_is_finite(down) and _is_finite(up)):
            raise ValueError(f"{file}: {layer} contains NaN or infinite values. {BROKEN}")
        changes[layer] = LowRank(down, up, (rank if given is None else given) / rank)
    return changes, tuple(sorted(set(tensors) - used))


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.float().isfinite().all())  # 8-bit floats have no test of their own


def _single(alpha: Any, name: str) -> float:
    """One finite number, from a tensor or from JSON.

    Raises:
        ValueError: it is none.
    """
    try:
        value = float(alpha)
    except (RuntimeError, TypeError, ValueError):
        given = f"of shape {list(alpha.shape)}" if isinstance(alpha, Tensor) else f"{alpha!r:.60}"
        raise ValueError(f"{name} is {given}; it must be one number. {BROKEN}") from None
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be finite. {BROKEN}")
    return value


def default_alpha(path: Path, metadata: Mapping[str, str]) -> float | None:
    """Alpha as peft and diffusers keep it: beside the file, or in its header.

    Rank-stabilised LoRAs are scaled by alpha / sqrt(rank) (arXiv 2312.03732).

    Raises:
        ValueError: layers have scales of their own.
    """
    config = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and config.is_file():
        saved = _json_object(config.read_text("utf-8", errors="replace"), config.name)
        alpha = _single(saved.get("lora_alpha"), f"{config.name}: lora_alpha")
        if saved.get("alpha_pattern") or (saved.get("use_rslora") and saved.get("rank_pattern")):
            raise ValueError(
                f"{config.name} gives layers scales of their own, which are not read. Save it "
                "with one alpha and rank for all layers."
            )
        if not saved.get("use_rslora"):
            return alpha
        return alpha * max(0.0, _single(saved.get("r"), f"{config.name}: r")) ** 0.5
    if "lora_adapter_metadata" in metadata:
        where = f"{path.name}: lora_adapter_metadata"
        saved = _json_object(metadata["lora_adapter_metadata"], where)
        found = [value for key, value in saved.items() if key.split(".")[-1] == "lora_alpha"]
        return _single(found[0], f"{where}: lora_alpha") if found else None
    return None


def _json_object(text: str, name: str) -> dict[str, Any]:
    """Raises ValueError where a text is no JSON object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{name} is no JSON object. {BROKEN}")
    return found
