"""What the artist chooses for the detail branch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..device.budget import AUTO
from ..geometry.grid import Grid
from ..geometry.plan import Plan
from ..geometry.windows import COMPACT, trained_size
from ..lora.guide import GuideLora

OVERLAPS = ("shifted", "sliding")
GUIDE_NOISE = ("matched", "clean")


def require_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not one of the allowed.

    Raises:
        ValueError: says which are.
    """
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}.")


@dataclass(frozen=True)
class DetailSettings:
    """What the artist chose for the detail branch."""

    plan: Plan
    window: Grid
    overlap: str
    guide_noise: str
    proxy: Tensor | None
    """The proxy latent as the model sees it (process_in applied), or None for windows alone."""
    sigma_start: float
    sigma_end: float
    budget: int | None = None
    """Bytes of device memory beside the weights, or None for what is free."""
    attention: str = "auto"
    keep_blocks: int = 0
    """Blocks of 128 keys that a window reads, 0 for all."""
    guide_lora: GuideLora | None = None
    guide_weight: float = 1.0
    """How often each of the guide's keys counts in the softmax, above 0."""
    guide_margin: int = 0
    """Guide tokens that a window reads on every side beside its aligned ones."""

    @property
    def is_always_active(self) -> bool:
        """Whether every step of a sampling is for the detail branch."""
        return self.sigma_start >= 1 and self.sigma_end <= 0

    def is_active(self, sigmas: Tensor | None) -> bool:
        """Whether a step at these noise levels is, one per item; outside of sampling all are."""
        return sigmas is None or self.sigma_end <= float(sigmas.max()) <= self.sigma_start


def preset_window(
    preset: str, plan: Plan, custom: Grid, guide_lora: GuideLora | None = None
) -> Grid:
    """The window of a preset: `compact`, `trained size`, or `custom`, which gives its own sizes.

    `auto` is the window that the guide LoRA was trained with, else compact; without a guide LoRA
    it is the trained size.

    Raises:
        ValueError: unknown preset, or a custom size below 1.
    """
    trained = trained_size(plan.proxy_tokens)
    presets = {"auto": trained, "compact": COMPACT, "trained size": trained}
    if guide_lora is not None:
        recipe = guide_lora.file.recipe
        presets["auto"] = (recipe and recipe.window) or COMPACT
    if preset == "custom":
        if min(custom) < 1:
            raise ValueError(f"The custom window is {custom}; every side must be at least 1 token.")
        return custom
    if preset not in presets:
        raise ValueError(f"window is {preset!r}; allowed are {', '.join(presets)}, custom.")
    return presets[preset]


def preset_guide_noise(guide_noise: str, guide_lora: GuideLora | None) -> str:
    """`auto` is what the guide LoRA was trained with, else clean; without one it is matched."""
    if guide_noise != "auto":
        return guide_noise
    if guide_lora is None:
        return "matched"
    recipe = guide_lora.file.recipe
    return (recipe and recipe.guide_noise) or "clean"


GUIDE_SHARE = 16.0


def auto_guide_weight(window_keys: int, guide_keys: int) -> float:
    """A weight for a model that was not trained to read the guide.

    All of its keys together count 16 times as often as the window's own together: the best of 1/4,
    4 and 16 in benchmarks/quality.md, by fidelity and seams, at little cost in detail.
    """
    return max(1.0, GUIDE_SHARE * window_keys / guide_keys)


def preset_guide_weight(
    guide_weight: str | float, guide_lora: GuideLora | None, window_keys: int, guide_keys: int
) -> float:
    """How often each of the guide's keys counts in the softmax; 0: they are not read.

    `auto` is what the guide LoRA was trained with; without one it follows the keys that a query
    reads of its window and of the guide.

    Raises:
        ValueError: see `parse_guide_weight`.
    """
    weight = parse_guide_weight(guide_weight)
    if weight is not None:
        return weight
    if guide_lora is None:
        return auto_guide_weight(window_keys, guide_keys)
    recipe = guide_lora.file.recipe
    return recipe.trained_guide_weight if recipe else 1.0


def parse_guide_weight(guide_weight: str | float) -> float | None:
    """A guide weight as it was written; None for "auto".

    Raises:
        ValueError: it is neither that nor a finite number of at least 0.
    """
    if str(guide_weight).strip() == AUTO:
        return None
    try:
        weight = float(guide_weight)
    except (TypeError, ValueError):
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(
            f'guide_weight is {guide_weight!r}; write "auto" or a number from 0 on, such as 8: '
            "1 is plain attention, more follows the proxy more closely, 0 leaves it out."
        )
    return weight
