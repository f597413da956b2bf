"""Seams: what happens where windows meet that does not happen elsewhere.

A seam is judged by the step across a line beyond the mean step on both sides of it. Each cut is
compared with the nearest token borders on either side at which no window ends: those lie at the
same phase of the VAE's grid, and beside the cut, so neither that grid nor the picture's content
counts. The median over cuts keeps an edge of the content that happens to lie on one from deciding.

Texture still makes for noise: on 1/f noise of 38 grey levels rms about 1 or 2 of them. Where there
is a truth or a proxy, give the video less it (values around 0): offsets far smaller then show.
"""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass

import torch
from torch import Tensor

from .frames import GREY_LEVELS, Frames, require_frame, shrink_to_blocks
from .lines import Lines

NOTHING = 0.01
"""Grey levels below which a step counts as none, so that flat areas have a ratio too."""

SEGMENT = 128
"""Pixels along a line over which an offset is taken to be the same: half a compact window, and
enough for texture to average out."""
REACH = 4
"""Pixels on either side of a line that are taken together: a decoder smears a latent's step over
several pixels. Four of them twice on either side stay clear of the next line."""


@dataclass(frozen=True)
class SeamScore:
    """How much windows show along one axis."""

    excess: float
    """Rms grey levels by which neighbouring windows are offset, 0 for none.

    Coherent along a segment, so texture hardly counts. Below 0 where cuts are calmer than the rest.
    """
    ratio: float
    """Mean absolute step, pixel by pixel, at cuts over elsewhere: 1 for none.

    Sees a break of texture too, which has no offset.
    """
    cuts: int
    """Cuts that were compared."""


def row_seams(video: Frames, lines: Lines, segment: int = SEGMENT, reach: int = REACH) -> SeamScore:
    """Seams along horizontal lines.

    Args:
        lines: of the rows.
        segment: pixels along a line that share an offset.
        reach: pixels on either side that are taken together. Of a step that is smeared over 5
            pixels 1 sees nothing, 4 sees 55 % and 8 sees 77 %; over 9 it is 0, 17 and 58 %. Beyond
            4 the bands reach the next lines.

    Raises:
        ValueError: the lines are of another size, or windows end at every token border.
    """
    return _seams_in_space(video, lines, segment, reach, axis=0)


def column_seams(
    video: Frames, lines: Lines, segment: int = SEGMENT, reach: int = REACH
) -> SeamScore:
    """Seams along vertical lines; see `row_seams`."""
    return _seams_in_space(video, lines, segment, reach, axis=1)


def frame_seams(video: Frames, lines: Lines, block: int = 16) -> SeamScore:
    """Seams in time: jumps between frames of the mean colours of blocks of pixels.

    Raises:
        ValueError: the lines are of another length, or windows end at every latent frame.
    """
    blocks = torch.stack([shrink_to_blocks(frame, block) for frame in video])
    _require_length(blocks.shape[0], lines, "frames")
    positions = _comparable(lines, reach=1)
    steps = steps_across(blocks, positions, axis=0, reach=1).flatten(1)
    return _score(steps.square().mean(1), steps.abs().mean(1), positions, lines)


def steps_across(x: Tensor, positions: list[int], axis: int, reach: int = 1) -> Tensor:
    """The step across each line beyond the mean step beside it, in grey levels: [lines, ...].

    From means of bands a, b | c, d of `reach` pixels each: 3/2 (c - b) - 1/2 (d - a), which is the
    height of a step on the line and 0 for any slope.

    Args:
        x: values from 0 to 1.
        positions: lines with 2 * reach pixels on either side.
        axis: of x, that the lines cut; the others follow in the result.
    """
    x = x.movedim(axis, 0)
    p = torch.tensor(positions, dtype=torch.long, device=x.device)
    a, b, c, d = (
        torch.stack([x[p + band * reach + i] for i in range(reach)]).mean(0)
        for band in (-2, -1, 0, 1)
    )
    return GREY_LEVELS * (1.5 * (c - b) - 0.5 * (d - a))


class SeamMeter:
    """Takes frames one at a time and scores their seams along one axis.

    Args:
        axis: 0 for seams along horizontal lines, 1 for vertical ones.

    Raises:
        ValueError: see `row_seams`.
    """

    def __init__(self, lines: Lines, axis: int, segment: int = SEGMENT, reach: int = REACH):
        self.lines, self.axis = lines, axis
        self._segment, self._reach = segment, reach
        self._positions = _comparable(lines, reach)
        self._sums: Tensor | None = None
        self._frames = 0

    def add(self, frame: Tensor) -> SeamScore:
        """Takes a frame [H, W, 3]; its own score, alone."""
        require_frame(frame)
        _require_length(frame.shape[self.axis], self.lines, ("rows", "columns")[self.axis])
        steps = self._steps(frame)
        energies = _segment_means(steps, self._segment).square().flatten(1).mean(1)
        sums = torch.stack([energies, steps.abs().flatten(1).mean(1)])
        self._sums = sums if self._sums is None else self._sums + sums
        self._frames += 1
        return _score(sums[0], sums[1], self._positions, self.lines)

    def score(self) -> SeamScore:
        """Of all frames so far, one or more."""
        assert self._sums is not None
        energies, roughness = self._sums / self._frames
        return _score(energies, roughness, self._positions, self.lines)

    def heights(self, frame: Tensor) -> dict[int, list[float]]:
        """The steps of a frame's segments in grey levels, beyond what is usual, by cut."""
        steps = _segment_means(self._steps(frame), self._segment).square().mean(-1).sqrt()
        cuts = [p in self.lines.cuts for p in self._positions]
        elsewhere = [i for i, is_cut in enumerate(cuts) if not is_cut]
        usual = steps[elsewhere].median() if elsewhere else steps.new_zeros(())
        beyond = (steps - usual).clamp(min=0).tolist()
        return {p: beyond[i] for i, p in enumerate(self._positions) if cuts[i]}

    def _steps(self, frame: Tensor) -> Tensor:
        return steps_across(frame, self._positions, self.axis, self._reach)


def _seams_in_space(video: Frames, lines: Lines, segment: int, reach: int, axis: int) -> SeamScore:
    meter = SeamMeter(lines, axis, segment, reach)
    for frame in video:
        meter.add(frame)
    return meter.score()


def _segment_means(steps: Tensor, segment: int) -> Tensor:
    """Means of [lines, length, 3] over segments: [lines, segments, 3]; a shorter rest is left."""
    length = steps.shape[1]
    segment = min(segment, length)
    whole = steps[:, : length - length % segment]
    return whole.unflatten(1, (-1, segment)).mean(2)


def _comparable(lines: Lines, reach: int) -> list[int]:
    """Lines with room for two bands on either side."""
    room = 2 * reach
    return [p for p in sorted((*lines.cuts, *lines.others)) if room <= p <= lines.length - room]


def _score(energies: Tensor, roughness: Tensor, positions: list[int], lines: Lines) -> SeamScore:
    """Compare the values [lines] of cuts with those beside them."""
    cuts, others = (
        [i for i, p in enumerate(positions) if (p in chosen)]
        for chosen in (set(lines.cuts), set(lines.others))
    )
    if not cuts:
        return SeamScore(0.0, 1.0, 0)
    if not others:
        raise ValueError(
            f"Windows end at every token border of an axis of length {lines.length}: there is "
            "nothing to compare seams with. Use windows of more than 2 tokens."
        )
    excess = _median(energies[cuts] - _beside(energies, cuts, others))
    base = _beside(roughness, cuts, others)
    ratio = _median((roughness[cuts] + NOTHING) / (base + NOTHING))
    return SeamScore(signed_root(excess), ratio, len(cuts))


def _beside(values: Tensor, cuts: list[int], others: list[int]) -> Tensor:
    """Mean of the values at the nearest other line on either side of each cut: [cuts]."""
    means = []
    for cut in cuts:
        after = bisect(others, cut)
        means.append(values[others[max(0, after - 1) : after + 1]].mean())
    return torch.stack(means)


def _median(values: Tensor) -> float:
    return float(values.double().quantile(0.5))


def signed_root(value: float) -> float:
    """Square root of the magnitude with the sign kept: a difference of energies as a level."""
    return abs(value) ** 0.5 * (1 if value >= 0 else -1)


def _require_length(length: int, lines: Lines, what: str) -> None:
    if length != lines.length:
        raise ValueError(f"The video has {length} {what}; the lines were made for {lines.length}.")
