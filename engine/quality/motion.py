"""How fast something moves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SpeedScore:
    """A velocity (x, y) in pixels per frame against the one that was wanted."""

    measured: tuple[float, float]
    expected: tuple[float, float]

    @property
    def error(self) -> float:
        """Length of the difference, pixels per frame."""
        return float(torch.tensor(self.measured).sub(torch.tensor(self.expected)).norm())

    @property
    def ratio(self) -> float:
        """Speed along the expected direction over the expected one: 1 is right, 0.25 too slow.

        nan where no motion is expected.
        """
        measured, expected = (
            torch.tensor(v, dtype=torch.float64) for v in (self.measured, self.expected)
        )
        return float(measured @ expected / (expected @ expected))


def centroids(masks: Tensor) -> Tensor:
    """Centre (x, y) of an object in every frame, in pixels: [T, 2].

    nan where there is none or it touches the border: the centre of what is left of an object that
    leaves the frame moves more slowly than the object.

    Args:
        masks: [T, H, W] boolean.
    """
    weights = masks.double()
    area = weights.sum((1, 2))
    x = (weights.sum(1) @ torch.arange(masks.shape[2]).to(weights)) / area
    y = (weights.sum(2) @ torch.arange(masks.shape[1]).to(weights)) / area
    rows, columns = masks[:, [0, -1]].flatten(1), masks[:, :, [0, -1]].flatten(1)
    cut = torch.cat([rows, columns], 1).any(1)
    return torch.stack([x, y], 1).masked_fill(cut[:, None], torch.nan)


def velocity(positions: Tensor) -> tuple[float, float]:
    """Velocity (x, y) of positions [T, 2], per frame: the median slope of all pairs (Theil-Sen).

    Up to 29 % of wrong positions do not matter. Frames with nan are left out.

    Raises:
        ValueError: fewer than two frames have a position.
    """
    frames = (~positions.isnan().any(1)).nonzero().flatten()
    if len(frames) < 2:
        raise ValueError(
            f"The object has a position in {len(frames)} frames; a speed needs at least 2. It may "
            "be missing or touch the border: measure the flow in its mask instead."
        )
    early, late = torch.combinations(frames).T
    slopes = (positions[late] - positions[early]) / (late - early)[:, None]
    return _pair(slopes)


def velocity_of_flow(flows: Tensor, masks: Tensor) -> tuple[float, float]:
    """Velocity (x, y) of what a mask shows, in pixels per frame: median over pixels, then frames.

    Args:
        flows: [T - 1, H, W, 2].
        masks: [T - 1, H, W] boolean, of the frame that each flow starts from.

    Raises:
        ValueError: shapes that do not belong together, or masks that are all empty.
    """
    if flows.shape[:3] != masks.shape:
        raise ValueError(
            f"The flow is {tuple(flows.shape)} and the masks are {tuple(masks.shape)}; expected "
            "are (pairs, height, width, 2) and (pairs, height, width)."
        )
    medians = [_median(flow[mask]) for flow, mask in zip(flows, masks, strict=True) if mask.any()]
    if not medians:
        raise ValueError("No mask has a pixel: there is nothing whose speed could be measured.")
    return _pair(torch.stack(medians))


def _median(values: Tensor) -> Tensor:
    """Median over the first axis; the mean of the middle two where there are two."""
    ordered = values.double().sort(0).values
    middle = (len(values) - 1) // 2, len(values) // 2
    return (ordered[middle[0]] + ordered[middle[1]]) / 2


def _pair(vectors: Tensor) -> tuple[float, float]:
    x, y = _median(vectors).tolist()
    return x, y
