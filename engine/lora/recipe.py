"""What a LoRA of this pack was trained for, as kept in its file's metadata."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path

from ..geometry.grid import Grid
from ..geometry.shape import BaseShape

KEY = "atlasvid"
"""Metadata key; its value is JSON."""
STAGES = ("proxy", "guide", "target")
DETAIL_STAGES = ("guide", "target")
"""Those whose LoRA is for the detail branch."""


def pack_version() -> str:
    """The version in the pack's pyproject.toml."""
    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    return tomllib.loads(project.read_text("utf-8"))["project"]["version"]


@dataclass(frozen=True)
class Recipe:
    """How a LoRA was trained, hence how it is to be used."""

    stage: str
    """`proxy`: an ordinary LoRA of the proxy's sampler. `guide`, `target`: for that stream only."""
    temporal_stride: int
    window: Grid | None
    """Tokens per window; None for stage proxy."""
    guide_noise: str | None
    rank: int
    alpha: float
    base: BaseShape
    steps: int
    version: str
    guide_weight: float | None = None
    """How often each of the guide's keys counted; None for stage proxy and in older files."""

    ratio: float | None = None
    """Of target to proxy, as `Plan.ratio`; None for stage proxy and in older files."""

    @property
    def trained_guide_weight(self) -> float:
        """The guide weight of its training, which was 1 before there was a choice."""
        return 1.0 if self.guide_weight is None else self.guide_weight

    def to_metadata(self) -> dict[str, str]:
        """For a safetensors header."""
        return {KEY: json.dumps(asdict(self))}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str] | None) -> Recipe | None:
        """The recipe in a header, or None for a file of another origin.

        Raises:
            ValueError: a recipe that this version cannot read.
        """
        text = (metadata or {}).get(KEY)
        if text is None:
            return None
        try:
            fields = json.loads(text)
            window = fields.pop("window")
            base = BaseShape(**fields.pop("base"))
            weight = fields.get("guide_weight")
            if weight is not None and not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"guide_weight is {weight}")
            return cls(window=Grid(*window) if window else None, base=base, **fields)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"The LoRA's AtlasVid metadata cannot be read ({error}). It was written by another "
                "version of the pack; update the pack."
            ) from error
