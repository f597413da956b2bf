"""LoRA files, in the layouts of peft, diffusers, ComfyUI and kohya."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .recipe import Recipe

FACTOR = re.compile(
    r"^(?P<layer>.+?)[._]lora(?:_linear_layer)?[._](?P<side>A|B|down|up)"
    r"(?:\.(?!weight$)\w+)?(?:\.weight)?$"
)


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
    changes, unread = pairs_of(tensors, default_alpha(path, metadata))
    if not changes:
        raise ValueError(
            f"{path.name} holds no LoRA: none of its {len(tensors)} tensors is half of a low-rank "
            "pair (lora_A/lora_B, lora_down/lora_up)."
        )
    return LoraFile(path.name, changes, unread, Recipe.from_metadata(metadata))


def pairs_of(
    tensors: Mapping[str, Tensor], alpha: float | None = None
) -> tuple[dict[str, LowRank], tuple[str, ...]]:
    """Low-rank pairs by layer name, and the keys that belong to none.

    Args:
        alpha: for layers without an `.alpha` of their own; None means alpha = rank.
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
            given = float(tensors[own])
        rank = len(down)
        changes[layer] = LowRank(down, up, (rank if given is None else given) / rank)
    return changes, tuple(sorted(set(tensors) - used))


def default_alpha(path: Path, metadata: Mapping[str, str]) -> float | None:
    """Alpha as peft and diffusers keep it: beside the file, or in its header.

    Rank-stabilised LoRAs are scaled by alpha / sqrt(rank) (arXiv 2312.03732).

    Raises:
        ValueError: layers have scales of their own.
    """
    config = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and config.is_file():
        saved = json.loads(config.read_text("utf-8"))
        alpha = float(saved["lora_alpha"])
        if saved.get("alpha_pattern") or (saved.get("use_rslora") and saved.get("rank_pattern")):
            raise ValueError(
                f"{config.name} gives layers scales of their own, which are not read. Save it "
                "with one alpha and rank for all layers."
            )
        return alpha * saved["r"] ** 0.5 if saved.get("use_rslora") else alpha
    if "lora_adapter_metadata" in metadata:
        saved = json.loads(metadata["lora_adapter_metadata"])
        found = [value for key, value in saved.items() if key.split(".")[-1] == "lora_alpha"]
        return float(found[0]) if found else None
    return None
