"""LoRA files, and their use in the guide stream alone (UltraImageGen's low-resolution LoRA).

A guide LoRA never touches the model: the guide stream runs through a view of it, in which the
adapted layers are wrapped and all else is the model's own. So the target's tokens see the base
weights whatever happens, with any dtype, offloading, quantisation or stock LoRA below.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from . import host
from .grid import Grid
from .recipe import BaseShape, Recipe

log = logging.getLogger("atlasvid")

PREFIXES = re.compile(
    r"^(base_model\.model\.|diffusion_model\.|transformer(_2)?\.|unet\.|model\."
    r"|lora_unet__?|lora_transformer_|lycoris_)"
)
FACTOR = re.compile(
    r"^(?P<layer>.+?)[._]lora(?:_linear_layer)?[._](?P<side>A|B|down|up)"
    r"(?:\.(?!weight$)\w+)?(?:\.weight)?$"
)
DIFFUSERS_NAMES = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
}
GUIDE_LAYERS = ("blocks.", "time_embedding.", "time_projection.")
"""What the guide's tokens pass on their own; text and head are shared with the target."""


@dataclass(frozen=True)
class LowRank:
    """The change of one linear layer: scale * up @ down."""

    down: Tensor
    """[rank, in]"""
    up: Tensor
    """[out, rank]"""
    scale: float
    """alpha / rank"""


class LowRankLinear(nn.Module):
    """A linear layer plus a low-rank change; the layer is called, its weights are not read."""

    def __init__(self, base: nn.Module, change: LowRank, strength: float):
        super().__init__()
        self.base = base
        self.change = change
        self.scale = change.scale * strength

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        low = F.linear(x, host.cast(self.change.down, x)) * self.scale
        return self.base(x) + F.linear(low, host.cast(self.change.up, x))


def with_layers(module: nn.Module, layers: Mapping[str, nn.Module]) -> Any:
    """A view of a module tree with other layers in the named places.

    Only containers on the way to a replaced layer are copied (shallowly: parameters, buffers and
    hooks are shared), so later changes to the shared layers show in the view.
    """
    view = copy.copy(module)
    children: dict[str, nn.Module | None] = dict(module._modules)
    inner: dict[str, dict[str, nn.Module]] = {}
    for name, layer in layers.items():
        head, _, rest = name.partition(".")
        if rest:
            inner.setdefault(head, {})[rest] = layer
        else:
            children[head] = layer
    for head, below in inner.items():
        child = children[head]
        assert child is not None
        children[head] = with_layers(child, below)
    view.__dict__["_modules"] = children
    return view


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


# --- Matching with a model ------------------------------------------------------------------


def plain_name(layer: str) -> str:
    """A layer's name without the prefixes that tools put before it, dots as underscores."""
    while (short := PREFIXES.sub("", layer)) != layer:
        layer = short
    return layer.replace(".", "_")


def known_names(model: nn.Module) -> dict[str, str]:
    """Plain names, original and diffusers', of the linear layers that guide tokens pass."""
    names = {}
    for name, module in model.named_modules():
        if not (isinstance(module, nn.Linear) and name.startswith(GUIDE_LAYERS)):
            continue
        names[plain_name(name)] = name
        for own, theirs in DIFFUSERS_NAMES.items():
            if name.endswith(own):
                names[plain_name(name.removesuffix(own) + theirs)] = name
    return names


def match(changes: Mapping[str, LowRank], model: nn.Module) -> tuple[dict[str, LowRank], list[str]]:
    """Changes by the model's names of layers, and the file's names that match none.

    Raises:
        ValueError: a layer matches by name but has another size.
    """
    names = known_names(model)
    found, lost = {}, []
    for layer, change in changes.items():
        name = names.get(plain_name(layer))
        if name is None:
            lost.append(layer)
            continue
        linear: Any = model.get_submodule(name)
        given = (change.up.shape[0], change.down.shape[1])
        if given != (linear.out_features, linear.in_features):
            raise ValueError(
                f"The LoRA changes {name} as a layer of {given[1]} inputs and {given[0]} outputs; "
                f"in this model it has {linear.in_features} and {linear.out_features}. It was "
                "trained on another base model (1.3B, 5B and 14B do not mix)."
            )
        found[name] = change
    return found, lost


@dataclass(frozen=True)
class GuideLora:
    """A LoRA for the guide stream, with its strength."""

    file: LoraFile
    strength: float

    def changes_of(self, model: Any) -> dict[str, LowRank]:
        """Changes by layer of a WanModel; what does not match is counted in a warning.

        Raises:
            ValueError: no layer matches, or the base has another shape.
        """
        file, recipe = self.file, self.file.recipe
        if recipe and recipe.base != BaseShape.of(model):
            raise ValueError(
                f"{file.name} was trained on a Wan of {recipe.base}; this model has "
                f"{BaseShape.of(model)}. Load the model that it was trained on."
            )
        found, lost = match(file.changes, model)
        if not found:
            raise ValueError(
                f"None of the {len(file.changes)} layers in {file.name} is a layer of this model, "
                f"for example {lost[0]}. It was made for another kind of model."
            )
        if lost or file.unread:
            log.warning(
                "Guide LoRA %s: %d of its %d layers are used. Not used: %d layers%s, %d other "
                "tensors%s.",
                file.name,
                len(found),
                len(file.changes),
                len(lost),
                f" (such as {lost[0]})" if lost else "",
                len(file.unread),
                f" (such as {file.unread[0]})" if file.unread else "",
            )
        return found

    def warn_of_mismatch(
        self, stride: int, window: Grid, guide_noise: str, guide_weight: float
    ) -> None:
        """Say which of the node's settings differ from those that the LoRA was trained with."""
        recipe = self.file.recipe
        if recipe is None:
            return
        settings = (
            ("temporal_stride", stride, recipe.temporal_stride),
            ("window", window, recipe.window or window),
            ("guide_noise", guide_noise, recipe.guide_noise or guide_noise),
            ("guide_weight", guide_weight, recipe.trained_guide_weight),
        )
        for name, used, trained in settings:
            if used != trained:
                log.warning(
                    "Guide LoRA %s was trained with %s %s and is used with %s; expect less from "
                    "it, or change that.",
                    self.file.name,
                    name,
                    trained,
                    used,
                )

    def view(self, model: Any) -> Any:
        """The model as the guide stream sees it; `model` itself is not touched."""
        if self.strength == 0:
            return model
        layers = {
            name: LowRankLinear(model.get_submodule(name), change, self.strength)
            for name, change in match(self.file.changes, model)[0].items()
        }
        return with_layers(model, layers)


def load_guide_lora(path: str | Path, strength: float) -> GuideLora:
    """A LoRA file for the guide stream.

    Raises:
        ValueError: see `read_lora`; or the file says that it is a proxy LoRA.
    """
    file = read_lora(path)
    if file.recipe and file.recipe.stage != "guide":
        raise ValueError(
            f"{file.name} was trained for the {file.recipe.stage}, not for the guide. Load it with "
            "LoraLoaderModelOnly on the model that samples the proxy."
        )
    return GuideLora(file, strength)
