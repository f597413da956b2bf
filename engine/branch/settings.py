"""What the artist chooses for the detail branch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from ..device.budget import AUTO
from ..geometry.grid import Grid
from ..geometry.layout import Layout
from ..geometry.plan import Plan
from ..geometry.shape import BaseShape
from ..geometry.windows import COMPACT, trained_size
from ..lora.guide import GuideLora, Habits
from .memory import Workload

GUIDE_NOISE = ("matched", "clean", "joint")


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

    layout: Layout
    guide_noise: str
    proxy: Tensor | None
    """The proxy latent as the model sees it (process_in applied), or None for windows alone."""
    sigma_start: float = 1.0
    sigma_end: float = 0.0
    budget: int | None = field(default=None, metadata={"identity": False})
    """Bytes of device memory beside the weights, or None for what is free. It only decides in
    which pieces work is done, so a render may go on with another after memory ran out."""
    attention: str = AUTO
    keep_blocks: int = 0
    """Blocks of 128 keys that a window reads, 0 for all."""
    guide_lora: GuideLora | None = None
    target_lora: GuideLora | None = None
    guide_weight: float = 1.0
    """How often each of the guide's keys counts in the softmax, above 0."""

    @property
    def plan(self) -> Plan:
        return self.layout.plan

    @property
    def guided(self) -> bool:
        """Whether windows read a proxy."""
        return self.proxy is not None

    @property
    def guide_is_clean(self) -> bool:
        return self.guide_noise == "clean"

    @property
    def guide_is_joint(self) -> bool:
        """Whether the guide is denoised beside the target."""
        return self.guided and self.guide_noise == "joint"

    def workload(self, shape: BaseShape, itemsize: int, videos: int, keep_guide: bool) -> Workload:
        """The sizes of a forward.

        Args:
            keep_guide: whether a clean guide may serve every step.
        """
        return Workload.of(
            self.layout,
            shape,
            itemsize=itemsize,
            videos=videos,
            guided=self.guided,
            keep_guide=keep_guide and self.guide_is_clean,
        )

    @property
    def is_always_active(self) -> bool:
        """Whether every step of a sampling is for the detail branch."""
        return self.sigma_start >= 1 and self.sigma_end <= 0

    def is_active(self, sigmas: Tensor | None) -> bool:
        """Whether a step at these noise levels is, one per item; outside of sampling all are."""
        return sigmas is None or self.sigma_end <= float(sigmas.max()) <= self.sigma_start


def preset_window(preset: str, plan: Plan, custom: Grid, habits: Habits | None = None) -> Grid:
    """The window of a preset: `compact`, `trained size`, or `custom`, which gives its own sizes.

    Args:
        habits: of the guide LoRA, whose window `auto` is; without one it is the trained size.

    Raises:
        ValueError: unknown preset, or a custom size below 1.
    """
    trained = trained_size(plan.proxy_tokens)
    presets = {AUTO: trained, "compact": COMPACT, "trained size": trained}
    if habits is not None:
        presets[AUTO] = habits.window
    if preset == "custom":
        if min(custom) < 1:
            raise ValueError(f"The custom window is {custom}; every side must be at least 1 token.")
        return custom
    if preset not in presets:
        raise ValueError(f"window is {preset!r}; allowed are {', '.join(presets)}, custom.")
    return presets[preset]


def preset_guide_noise(guide_noise: str, habits: Habits | None) -> str:
    """`auto` is what the guide LoRA was trained with; without one it is matched."""
    if guide_noise != AUTO:
        return guide_noise
    return habits.guide_noise if habits else "matched"


GUIDE_SHARE = 16.0


def auto_guide_weight(window_keys: int, guide_keys: int) -> float:
    """A weight for a model that was not trained to read the guide.

    All of its keys together count 16 times as often as the window's own together: nearer to the
    proxy and to the truth than 1 and 4 in benchmarks/quality.md, where 64 gains no more.
    """
    return max(1.0, GUIDE_SHARE * window_keys / guide_keys)


def preset_guide_weight(
    guide_weight: str | float, habits: Habits | None, window_keys: int, guide_keys: int
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
    return habits.guide_weight if habits else auto_guide_weight(window_keys, guide_keys)


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
