"""A LoRA in one stream of the detail branch alone: the guide's (UltraImageGen's), or the target's.

It never touches the model: its stream runs through a view of it, in which the adapted layers are
wrapped and all else is the model's own. So the other stream's tokens see the base weights whatever
happens, with any dtype, offloading, quantisation or stock LoRA below.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..comfyui import models
from ..geometry.grid import Grid
from ..geometry.plan import Plan
from ..geometry.shape import BaseShape
from ..geometry.windows import COMPACT
from ..log import log
from .files import LoraFile, LowRank, read_lora
from .recipe import DETAIL_STAGES
from .view import with_layers

PREFIXES = re.compile(
    r"^(base_model\.model\.|diffusion_model\.|transformer(_2)?\.|unet\.|model\."
    r"|lora_unet__?|lora_transformer_|lycoris_)"
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


class LowRankLinear(nn.Module):
    """A linear layer plus a low-rank change; the layer is called, its weights are not read."""

    def __init__(self, base: nn.Module, change: LowRank, strength: float):
        super().__init__()
        self.base = base
        self.change = change
        self.scale = change.scale * strength

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        low = F.linear(x, models.cast(self.change.down, x)) * self.scale
        return self.base(x) + F.linear(low, models.cast(self.change.up, x))


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
class Habits:
    """What a guide LoRA was trained with; the usual where its file does not say."""

    window: Grid = COMPACT
    guide_noise: str = "clean"
    guide_weight: float = 1.0


@dataclass(frozen=True)
class GuideLora:
    """A LoRA for the guide stream, with its strength."""

    file: LoraFile
    strength: float

    @property
    def habits(self) -> Habits:
        recipe = self.file.recipe
        if recipe is None:
            return Habits()
        return Habits(
            recipe.window or COMPACT, recipe.guide_noise or "clean", recipe.trained_guide_weight
        )

    def require_stream(self, stream: str) -> None:
        """Raises ValueError where the LoRA says that it was trained for the other stream."""
        recipe = self.file.recipe
        if recipe and recipe.stage != stream:
            raise ValueError(
                f"{self.file.name} was trained for the {recipe.stage}'s tokens. Connect it to "
                f"{recipe.stage}_lora, not to {stream}_lora."
            )

    def require_base(self, shape: BaseShape) -> None:
        """Raises ValueError where the LoRA says that it was trained on a model of another shape."""
        recipe = self.file.recipe
        if recipe and recipe.base != shape:
            raise ValueError(
                f"{self.file.name} was trained on a model of {recipe.base}; this model has "
                f"{shape}. Load the model that it was trained on."
            )

    def changes_of(self, net: Any) -> dict[str, LowRank]:
        """Changes by layer of a diffusion model; what does not match is counted in a warning.

        Raises:
            ValueError: no layer matches.
        """
        file = self.file
        found, lost = match(file.changes, net)
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
        self, plan: Plan, window: Grid, guide_noise: str, guide_weight: float
    ) -> None:
        """Say which of the node's settings differ from those that the LoRA was trained with."""
        recipe = self.file.recipe
        if recipe is None:
            return
        settings = (
            ("temporal_stride", plan.temporal_stride, recipe.temporal_stride),
            ("target-to-proxy ratio", plan.ratio, recipe.ratio or plan.ratio),
            ("window", window, recipe.window or window),
            ("guide_noise", guide_noise, recipe.guide_noise or guide_noise),
            ("guide_weight", guide_weight, recipe.trained_guide_weight),
        )
        for name, used, trained in settings:
            if not _is_alike(used, trained):
                log.warning(
                    "Guide LoRA %s was trained with %s %s and is used with %s; expect less from "
                    "it, or change that.",
                    self.file.name,
                    name,
                    trained,
                    used,
                )

    def view(self, model: Any, like: Tensor | None = None) -> Any:
        """The model as the guide stream sees it; `model` itself is not touched.

        Args:
            like: its device and dtype are those of the factors; None leaves them where they are.
        """
        if self.strength == 0:
            return model
        layers = {
            name: LowRankLinear(
                model.get_submodule(name),
                change if like is None else change.to(like),
                self.strength,
            )
            for name, change in match(self.file.changes, model)[0].items()
        }
        return with_layers(model, layers)


def _is_alike(used: Any, trained: Any) -> bool:
    """Whether two settings are the same; ratios may differ by what rounding to tokens does."""
    if isinstance(used, float) and isinstance(trained, float):
        return abs(used - trained) <= 0.05 * trained
    return used == trained


def habits_of(*loras: GuideLora | None) -> Habits | None:
    """What the first LoRA that there is was trained with."""
    return next((lora.habits for lora in loras if lora), None)


def load_guide_lora(path: str | Path, strength: float) -> GuideLora:
    """A LoRA file for the guide stream, or for the target's.

    Raises:
        ValueError: see `read_lora`; or the file says that it is a proxy LoRA.
    """
    file = read_lora(path)
    if file.recipe and file.recipe.stage not in DETAIL_STAGES:
        raise ValueError(
            f"{file.name} was trained for the {file.recipe.stage}, not for the guide. Load it with "
            "LoraLoaderModelOnly on the model that samples the proxy."
        )
    return GuideLora(file, strength)
