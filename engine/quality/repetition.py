"""Repetition: objects that occur more often than they should, and pictures like themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from .bands import high_pass
from .frames import Size, luma, require_frame, shrink_to_blocks

# --- Objects ----------------------------------------------------------------------------------


def label_regions(mask: Tensor) -> Tensor:
    """Number the connected regions of a mask: [H, W], 0 outside and 1 to n inside.

    Pixels that touch at a corner are connected. Rows are cut into runs of pixels; runs that touch
    take the lowest number of their neighbours until nothing changes.

    Raises:
        ValueError: the mask is not boolean [H, W].
    """
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(
            f"The mask is {mask.dtype} {tuple(mask.shape)}; expected is boolean (height, width)."
        )
    runs = _runs(mask)
    labels = _merge(int(runs.max()) + 1 if runs.numel() else 1, _touching(runs))
    _, dense = labels.unique(return_inverse=True)
    return dense[runs]


def region_areas(labels: Tensor) -> Tensor:
    """Pixels of each region, from the first: [n]."""
    return labels.flatten().bincount()[1:]


def count_objects(mask: Tensor, minimal_area: int = 1) -> int:
    """Connected regions of a boolean mask [H, W] that have at least `minimal_area` pixels."""
    return int((region_areas(label_regions(mask)) >= minimal_area).sum())


def _runs(mask: Tensor) -> Tensor:
    """Number the horizontal runs of a mask: [H, W], 0 outside."""
    before = torch.zeros_like(mask)
    before[:, 1:] = mask[:, :-1]
    return (mask & ~before).flatten().cumsum(0).view(mask.shape) * mask


def _touching(runs: Tensor) -> Tensor:
    """Pairs of runs in neighbouring rows that touch: [2, pairs]."""
    upper, lower = runs[:-1], runs[1:]
    above = torch.cat([upper.flatten(), upper[:, 1:].flatten(), upper[:, :-1].flatten()])
    below = torch.cat([lower.flatten(), lower[:, :-1].flatten(), lower[:, 1:].flatten()])
    both = (above > 0) & (below > 0)
    # As one number per pair, because unique pairs are many times slower to find.
    base = int(runs.max()) + 1 if runs.numel() else 1
    keys = (above[both] * base + below[both]).unique()
    return torch.stack([keys // base, keys % base])


def _merge(count: int, pairs: Tensor) -> Tensor:
    """The lowest number connected with each of `count` numbers by pairs: [count]."""
    labels = torch.arange(count, device=pairs.device)
    while True:
        a, b = labels[pairs]
        if torch.equal(a, b):
            return labels
        lowest = torch.minimum(a, b)
        # Hooking the roots and then halving the paths joins whole regions per round.
        for ends in (a, b):
            labels = labels.scatter_reduce(0, ends, lowest, "amin")
        while not torch.equal(labels, labels[labels]):
            labels = labels[labels]


# --- Pictures like themselves -------------------------------------------------------------------


def self_similarity(frame: Tensor, window: Size, cell: int = 4) -> float:
    """How much more a frame resembles itself one window further than at other distances.

    The autocorrelation at whole numbers of windows, down or across, beyond its median at the
    distances between: 0 for none, about 1 where every window shows the same. Detail finer than
    `cell` and shapes larger than a window are left out: the one is noise, the other is alike at
    all distances.

    Args:
        frame: [H, W, 3].
        window: height and width of a window in pixels; a side of at least half the frame's cannot
            be seen to repeat.
        cell: pixels per side of the blocks that are compared.

    Raises:
        ValueError: the window is too large for the frame or smaller than 4 cells.
    """
    require_frame(frame)
    height, width = frame.shape[:2]
    if min(window) < 4 * cell or (2 * window[0] > height and 2 * window[1] > width):
        raise ValueError(
            f"The window is {window} (height, width) pixels; allowed is from {4 * cell} up to "
            f"half the frame's {(height, width)} in at least one direction."
        )
    modes = max(1, round(height / window[0])), max(1, round(width / window[1]))
    blocks = luma(high_pass(shrink_to_blocks(frame, cell), modes))
    correlation = autocorrelation(blocks)
    period = (
        window[0] * blocks.shape[0] / height,
        window[1] * blocks.shape[1] / width,
    )
    lines = zip((correlation[:, 0], correlation[0]), period, strict=True)
    return max(_peak(line, step) for line, step in lines if step < len(line))


def autocorrelation(picture: Tensor) -> Tensor:
    """Correlation of a picture [H, W] with itself moved by up to half its size: [H//2+1, W//2+1].

    Only the part that overlaps is compared; 1 at no lag.
    """
    height, width = picture.shape
    x = picture.double() - picture.double().mean()
    size = 2 * height, 2 * width
    moved = torch.fft.irfft2(torch.fft.rfft2(x, s=size).abs().square(), s=size)
    y, w = torch.arange(height // 2 + 1), torch.arange(width // 2 + 1)
    overlap = ((height - y)[:, None] * (width - w)[None]).to(x)
    mean = moved[: len(y), : len(w)] / overlap
    return mean / mean[0, 0].clamp(min=1e-12)


def _peak(line: Tensor, period: float) -> float:
    """Mean of correlations [lags] at whole periods, beyond their median at lags far from any.

    Far is more than a quarter of a period, where smoothness no longer makes a picture alike. The
    lags are of one direction, so stripes, alike at all of them, are no repetition.
    """
    phase = torch.arange(len(line)) / period
    far = (phase - phase.round()).abs() > 0.25
    at = [lag for k in range(1, len(line)) if (lag := round(k * period)) < len(line)]
    return float(line[at].mean() - line[far].median().clamp(min=0))
