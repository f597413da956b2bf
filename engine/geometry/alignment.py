"""Guide tokens aligned with windows of the target (docs/method.md: aligned positions).

All positions are in target token units.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from .grid import Grid
from .windows import Box


def lead(stride: int) -> float:
    """By how many target latents a proxy latent sits before `stride` times its number.

    It shows four frames, the first latent only one.
    """
    return 0.375 * (stride - 1)


def temporal_positions(count: int, stride: int) -> tuple[float, ...]:
    """P_t: the position of every proxy latent among the target's."""
    return tuple(0.0 if k == 0 else stride * k - lead(stride) for k in range(count))


@dataclass(frozen=True)
class GuideAlignment:
    """Where guide tokens sit on the target grid, and which of them a window reads.

    A window reads the guide tokens inside itself grown by one guide token on every side: per axis
    floor(window / spacing) + 2 of them, those nearest to the window's centre. The count is the
    same for every window, also for the smaller boxes at the border, so windows can be batched.

    Args:
        margin: guide tokens more on every side, as far as the guide reaches.
    """

    target: Grid
    guide: Grid
    temporal_stride: int
    window: Grid
    margin: int = 0

    @cached_property
    def positions(self) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
        """P_t, P_y, P_x: the position of every guide index, per axis, in target token units."""
        time = temporal_positions(self.guide.frames, self.temporal_stride)
        return (
            time,
            _cell_centres(self.guide.height, self.target.height),
            _cell_centres(self.guide.width, self.target.width),
        )

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Target tokens per guide token, per axis."""
        return (
            float(self.temporal_stride),
            self.target.height / self.guide.height,
            self.target.width / self.guide.width,
        )

    @cached_property
    def count(self) -> Grid:
        """Guide tokens that every window reads, per axis."""
        return Grid(
            *(
                min(n, int(w // s) + 2 + 2 * self.margin)
                for n, w, s in zip(self.guide, self.window, self.spacing, strict=True)
            )
        )

    def offsets(self, axis: int, window: Box) -> tuple[float, ...]:
        """Positions, from the window's first token, of the guide tokens that it reads."""
        first = self._first(axis, window)
        positions = self.positions[axis][first : first + self.count[axis]]
        return tuple(p - window.start[axis] for p in positions)

    def box(self, window: Box) -> Box:
        """The guide tokens that a window reads."""
        return Box(Grid(*(self._first(axis, window) for axis in range(3))), self.count)

    def _first(self, axis: int, window: Box) -> int:
        centre = window.start[axis] + (window.size[axis] - 1) / 2
        return _nearest_run(self.positions[axis], self.count[axis], centre)


def _cell_centres(cells: int, length: int) -> tuple[float, ...]:
    return tuple((i + 0.5) * length / cells - 0.5 for i in range(cells))


@lru_cache(maxsize=4096)
def _nearest_run(positions: tuple[float, ...], count: int, centre: float) -> int:
    """First index of the `count` neighbours whose farther end is nearest to `centre`.

    Ties go to the lower index; rounding keeps float noise from deciding them.
    """

    def reach(i: int) -> float:
        return round(max(centre - positions[i], positions[i + count - 1] - centre), 6)

    return min(range(len(positions) - count + 1), key=reach)
