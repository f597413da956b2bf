"""The measures of a rendered video over time, for the artist who made it.

Frames are read once, one after the other; what is kept of them is a few numbers each, and the worst
one's picture, shrunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..comfyui import management, server
from ..geometry.grid import Grid
from ..geometry.layout import Layout
from ..geometry.plan import Plan
from .bands import decibels, high_pass, psnr, rms
from .colour import frame_drift, means_in_time, rms_drift
from .flow import flicker_energies, is_visible, rms_in_grey_levels
from .frames import GREY_LEVELS, Frames, Size, enlarge, require_frame, shrink
from .lines import Lines, layout_lines
from .optical_flow import estimate_flow
from .seams import SeamMeter, SeamScore, signed_root
from .verdict import MEANINGS, verdict

FLOW_SIDE = 180
"""Pixels of the shorter side at which motion is estimated."""
SHOWN_WIDTH = 960
"""Pixels across of the worst frame that is kept."""
LIVE = 16
"""Copies of a frame, in float32, that measuring it needs at most."""


@dataclass(frozen=True)
class Curve:
    """A measure over time, and of the whole video; nan where it could not be measured."""

    frames: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    overall: float = math.nan


@dataclass(frozen=True)
class WorstFrame:
    """The frame whose worst measure is the worst of all.

    Args:
        number: of the frame.
        picture: [h, w, 3], shrunk.
        edges: borders of the windows of even blocks, down and across, with both ends, in pixels of
            the video.
        drift: colour drift of those windows in grey levels [down, across, 3], or None.
        rows, columns: steps at the borders of all blocks' windows beyond what is usual, in grey
            levels, by border, then segment after segment along it.
    """

    number: int
    picture: Tensor
    edges: tuple[tuple[int, ...], tuple[int, ...]]
    drift: Tensor | None
    rows: dict[int, list[float]]
    columns: dict[int, list[float]]


@dataclass(frozen=True)
class Report:
    """What was found in a video.

    Args:
        frames: that the video has.
        curves: by the names of `verdict.MEANINGS`.
        ratio: mean step at borders over elsewhere, 1 for none.
        jump: grey levels by which brightness jumps where windows end in time, beyond elsewhere.
    """

    layout: Layout
    frames: int
    curves: dict[str, Curve]
    ratio: float
    jump: float
    worst: WorstFrame | None

    @property
    def plan(self) -> Plan:
        return self.layout.plan

    @property
    def overall(self) -> dict[str, float]:
        return {name: curve.overall for name, curve in self.curves.items()}

    @property
    def verdict(self) -> str:
        """One line in an artist's words."""
        return verdict(self.overall, {name: self._worst_moment(name) for name in self.curves})

    def text(self) -> str:
        """The verdict, then one line per measure."""
        plan, window = self.plan, self.layout.window
        lines = [
            self.verdict,
            f"{plan.width} x {plan.height}, {self.frames} frames at {plan.fps:g} fps; windows of "
            f"{window} tokens, {self.layout.overlap}.",
        ]
        for name, meaning in MEANINGS.items():
            overall = self.curves[name].overall
            level = "" if math.isnan(overall) else f" ({meaning.level(overall)})"
            lines.append(f"{meaning.title}: {meaning.format(overall)}{level}")
        if not math.isnan(self.ratio):
            lines.append(f"Steps at window borders against elsewhere: {self.ratio:.2f} times")
        if not math.isnan(self.jump):
            lines.append(f"Jumps where windows end in time: {self.jump:.1f} grey levels")
        return "\n".join(lines)

    def _worst_moment(self, name: str) -> float:
        curve, badness = self.curves[name], MEANINGS[name].badness
        pairs = zip(curve.values, curve.frames, strict=True)
        _, frame = max(((badness(v), f) for v, f in pairs if not math.isnan(v)), default=(0, 0))
        return frame / self.plan.fps


def measure_video(
    video: Frames,
    plan: Plan,
    window: Grid,
    overlap: str = "shifted",
    proxy: Frames | None = None,
) -> Report:
    """Everything a report says of a video.

    Args:
        video: frames of the plan's size, as many as it has or fewer (a clip that was cut).
        window, overlap: by which it was sampled, see `geometry.layout`.
        proxy: its frame j shows the video's frame stride * j. Without it, what compares with a
            proxy is left out, and seams are looked for in the picture itself.

    Raises:
        ValueError: another size or more frames than the plan has, or a proxy that ends too early.
    """
    meter, count = _Meters(Layout(plan, window, overlap), proxy is not None), 0
    device, advance = _device(plan), server.progress_bar(plan.frames)
    small = iter(proxy) if proxy is not None else None
    for count, frame in enumerate(video, 1):
        management.raise_if_cancelled()
        number = count - 1
        _require_planned(frame, number, plan)
        on_device = frame.to(device)
        meter.follow(on_device, number)
        if number % plan.temporal_stride == 0:
            shown = _next_of(small, number, plan)
            meter.look(on_device, None if shown is None else shown.to(device), number)
        advance(1)
    if not count:
        raise ValueError("The video has no frames: connect one that has some.")
    return meter.report(count)


class _Meters:
    """What is kept of the frames that went by."""

    def __init__(self, layout: Layout, guided: bool):
        self.layout, self.guided = layout, guided
        self.lines = layout_lines(layout)
        spatial = (self.lines.all_blocks.rows, self.lines.all_blocks.columns)
        self.seams = [
            SeamMeter(lines, axis)
            for axis, lines in enumerate(spatial)
            if lines.cuts and lines.others
        ]
        self.values: dict[str, dict[int, float]] = {name: {} for name in MEANINGS}
        self.energies: dict[str, list[Tensor]] = {"error": [], "high": [], "enlarged": []}
        self.drifts: dict[int, Tensor] = {}
        self.flicker: dict[int, Tensor] = {}
        self.before: Tensor | None = None
        self.worst: WorstFrame | None = None
        self.worst_badness = -math.inf

    def follow(self, frame: Tensor, number: int) -> None:
        """Flicker against the frame before, along the estimated motion."""
        now = shrink(frame, _size_within(frame, FLOW_SIDE))
        if self.before is not None:
            flow, back = estimate_flow(self.before, now), estimate_flow(now, self.before)
            seen = is_visible(flow, back)
            (energy,) = flicker_energies((self.before, now), (flow,), (seen,))
            self.flicker[number] = energy
            self.values["flicker"][number] = rms_in_grey_levels(energy[None])
        self.before = now

    def look(self, frame: Tensor, small: Tensor | None, number: int) -> None:
        """A frame that the proxy shows: its seams, and how it differs from the proxy's."""
        rest, drift = frame, None
        if small is not None:
            rest, drift = self._compare(frame, small, number)
        if self.seams:
            scores = [meter.add(rest) for meter in self.seams]
            self.values["borders"][number] = _worse(scores).excess
        found = {name: values.get(number, math.nan) for name, values in self.values.items()}
        shown = ("borders", "drift", "fidelity", "flicker")
        bad = [b for name in shown if not math.isnan(b := MEANINGS[name].badness(found[name]))]
        if max(bad, default=-1e9) > self.worst_badness:
            self.worst_badness = max(bad, default=-1e9)
            self.worst = self._picture(frame, rest, drift, number)

    def _compare(self, frame: Tensor, small: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """The frame less the up-scaled proxy, and the drift of its windows."""
        size = small.shape[0], small.shape[1]
        large = enlarge(small, (frame.shape[0], frame.shape[1]))
        difference = shrink(frame, size) - small
        energies = {
            "error": difference.square().mean(),
            "high": high_pass(frame, size).square().mean(),
            "enlarged": high_pass(large, size).square().mean(),
        }
        for name, energy in energies.items():
            self.energies[name].append(energy)
        drift = frame_drift(difference, self.lines.block)
        self.drifts[number] = drift
        self.values["drift"][number] = rms_drift(drift)
        self.values["fidelity"][number] = psnr(energies["error"])
        self.values["detail"][number] = decibels(rms(energies["high"]), rms(energies["enlarged"]))
        return frame - large, drift

    def _picture(
        self, frame: Tensor, rest: Tensor, drift: Tensor | None, number: int
    ) -> WorstFrame:
        heights: list[dict[int, list[float]]] = [{}, {}]
        for meter in self.seams:
            heights[meter.axis] = meter.heights(rest)
        height, width = frame.shape[:2]
        across = min(width, SHOWN_WIDTH)
        picture = shrink(frame, (max(1, round(height * across / width)), across))
        block = self.lines.block
        edges = block.rows.edges, block.columns.edges
        drift = None if drift is None else drift.cpu()
        return WorstFrame(number, picture.clamp(0, 1).cpu(), edges, drift, *heights)

    def report(self, frames: int) -> Report:
        seams = [meter.score() for meter in self.seams]
        energies = {name: torch.stack(each) for name, each in self.energies.items() if each}
        overall = dict.fromkeys(MEANINGS, math.nan)
        if self.flicker:
            overall["flicker"] = rms_in_grey_levels(torch.stack([*self.flicker.values()]))
        if seams:
            overall["borders"] = _worse(seams).excess
        if self.guided:
            overall["drift"] = rms_drift(means_in_time(self.drifts, self.lines.block))
            overall["fidelity"] = psnr(energies["error"])
            overall["detail"] = decibels(rms(energies["high"]), rms(energies["enlarged"]))
        curves = {
            name: Curve(tuple(values), tuple(values.values()), overall[name])
            for name, values in self.values.items()
        }
        ratio = max((score.ratio for score in seams), default=math.nan)
        jump = _jump(self.flicker, self.lines.all_blocks.frames)
        return Report(self.layout, frames, curves, ratio, jump, self.worst)


def _device(plan: Plan) -> torch.device:
    """The card where it has room for a frame (sums need float64: a CUDA card), else the CPU."""
    device = management.compute_device()
    needed = LIVE * 3 * 4 * plan.width * plan.height
    if device.type == "cuda" and management.free_memory(device) > needed:
        return device
    return torch.device("cpu")


def _worse(scores: list[SeamScore]) -> SeamScore:
    return max(scores, key=lambda score: score.excess)


def _jump(energies: dict[int, Tensor], lines: Lines) -> float:
    """What changes where windows end in time hold beyond those at other latent frames' borders."""
    cuts, others = (
        [energies[p] for p in chosen if p in energies and not energies[p].isnan()]
        for chosen in (lines.cuts, lines.others)
    )
    if not cuts or not others:
        return math.nan
    beyond = torch.stack(cuts).mean() - torch.stack(others).mean()
    return GREY_LEVELS * signed_root(float(beyond))


def _size_within(frame: Tensor, side: int) -> Size:
    """The frame's size, its shorter side at most `side`."""
    height, width = frame.shape[:2]
    scale = min(1.0, side / min(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _next_of(proxy: Iterator[Tensor] | None, number: int, plan: Plan) -> Tensor | None:
    if proxy is None:
        return None
    small = next(proxy, None)
    if small is None:
        raise ValueError(
            f"The proxy ends before the frame that shows the video's frame {number}: the plan has "
            f"{plan.proxy_frames} proxy frames, one for every {plan.temporal_stride} of the video. "
            "Connect the proxy that was made by this plan."
        )
    require_frame(small)
    if (small.shape[1], small.shape[0]) != (plan.proxy_width, plan.proxy_height):
        raise ValueError(
            f"The proxy is {small.shape[1]} x {small.shape[0]}; the plan's is {plan.proxy_width} x "
            f"{plan.proxy_height}. Connect the proxy that was made by this plan."
        )
    return small


def _require_planned(frame: Tensor, number: int, plan: Plan) -> None:
    require_frame(frame)
    if (frame.shape[1], frame.shape[0]) != (plan.width, plan.height):
        raise ValueError(
            f"The video is {frame.shape[1]} x {frame.shape[0]}; the plan makes {plan.width} x "
            f"{plan.height}. Connect the video that was made by this plan."
        )
    if number >= plan.frames:
        raise ValueError(
            f"The video has more than the plan's {plan.frames} frames. Connect the video that was "
            "made by this plan."
        )
