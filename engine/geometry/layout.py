"""How a target is cut into windows, and what they read of the guide."""

from __future__ import annotations

from dataclasses import dataclass

from .alignment import GuideAlignment
from .grid import Grid
from .plan import Plan
from .windows import ShiftedWindows, SlidingWindows

OVERLAPS = ("shifted", "sliding")


@dataclass(frozen=True)
class Layout:
    """What the detail branch computes by and what its cost is counted from.

    Args:
        window: tokens; what is larger than the target's grid is cut off.
        overlap: `shifted` (disjoint windows that move between blocks) or `sliding` (every tile of
            queries reads a window centred on it).
        guide_margin: guide tokens that a window reads on every side beside its aligned ones.
    """

    plan: Plan
    window: Grid
    overlap: str = "shifted"
    guide_margin: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", self.window.clipped(self.plan.tokens))

    @property
    def windows(self) -> ShiftedWindows | SlidingWindows:
        kind = SlidingWindows if self.overlap == "sliding" else ShiftedWindows
        return kind(self.plan.tokens, self.window)

    @property
    def alignment(self) -> GuideAlignment:
        """Which of the guide's tokens windows read."""
        return self.plan.alignment(self.window, self.guide_margin)

    @property
    def keys(self) -> tuple[int, int]:
        """Keys that a query of a full window reads: (of its window, of the guide)."""
        return self.plan.keys_per_query(self.window, self.guide_margin)

    @property
    def ring_tokens(self) -> int:
        """Tokens whose keys and values sliding windows keep."""
        windows = self.windows
        return windows.ring.count if isinstance(windows, SlidingWindows) else 0
