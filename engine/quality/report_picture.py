"""A report as a picture: the verdict, a curve for every measure, and a map of the worst frame."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from textwrap import wrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .report import Curve, Report, WorstFrame
from .verdict import FAIR, GOOD, MEANINGS, POOR, Meaning, levels

SIZE = (1600, 1060)
FINE = 2
"""Drawn so much larger and shrunk: PIL draws lines without smooth edges."""
EDGE = 44
CURVES_WIDTH = 800
PANEL, GAP = 106, 56
TOP = 216

GROUND, FRAME = "#1b1720", "#4a4257"
TEXT, FAINT, LINE = "#efe9f5", "#a59bb3", "#c9a0dc"
COLOURS = {GOOD: "#7cc47f", FAIR: "#e3b34f", POOR: "#e8695f"}
ZONES = {GOOD: "#243229", FAIR: "#312b26", POOR: "#39252a"}
SEAM = "#ff6054"
SHOWN_STEP = 2.0
"""Grey levels above which a border is marked in the map."""


def draw_report(report: Report) -> Image.Image:
    """The whole picture."""
    canvas = _Canvas()
    found = levels(report.overall)
    _draw_head(canvas, report, found)
    for i, name in enumerate(MEANINGS):
        top = TOP + i * (PANEL + GAP)
        _draw_panel(canvas, MEANINGS[name], report.curves[name], report, top)
    _draw_time(canvas, report)
    if report.worst is not None:
        _draw_worst(canvas, report, report.worst)
    return canvas.picture.resize(SIZE, Image.Resampling.LANCZOS)


class _Canvas:
    """Draws in pixels of the finished picture."""

    def __init__(self) -> None:
        self.picture = Image.new("RGB", (SIZE[0] * FINE, SIZE[1] * FINE), GROUND)
        self._draw = ImageDraw.Draw(self.picture)

    def text(self, at: tuple[float, float], text: str, size: int, fill: str, anchor: str = "ls"):
        font = ImageFont.load_default(size * FINE)
        self._draw.text(_finer(at), text, fill=fill, font=font, anchor=anchor)

    def line(self, points: Sequence[tuple[float, float]], fill: str, width: float = 1) -> None:
        fine = [_finer(point) for point in points]
        self._draw.line(fine, fill=fill, width=round(width * FINE), joint="curve")

    def dot(self, at: tuple[float, float], radius: float, fill: str) -> None:
        x, y = at
        box = [*_finer((x - radius, y - radius)), *_finer((x + radius, y + radius))]
        self._draw.ellipse(box, fill=fill)

    def box(self, left: float, top: float, right: float, bottom: float, fill: str) -> None:
        self._draw.rectangle([*_finer((left, top)), *_finer((right, bottom))], fill=fill)

    def paste(self, picture: Image.Image, at: tuple[int, int]) -> None:
        size = picture.width * FINE, picture.height * FINE
        x, y = _finer(at)
        self.picture.paste(picture.resize(size, Image.Resampling.BICUBIC), (round(x), round(y)))


def _finer(at: tuple[float, float]) -> tuple[float, float]:
    return at[0] * FINE, at[1] * FINE


# --- Words and curves -------------------------------------------------------------------------


def _draw_head(canvas: _Canvas, report: Report, found: dict[str, str]) -> None:
    worst = POOR if POOR in found.values() else FAIR if FAIR in found.values() else GOOD
    canvas.box(0, 0, 10, SIZE[1], COLOURS[worst])
    first, _, rest = report.verdict.partition(". ")
    lines = wrap(first + ".", 84)[:2] + wrap(rest, 110)[:1] if rest else wrap(first, 84)[:3]
    y = 52
    for i, line in enumerate(lines):
        said_first = not rest or i < len(lines) - 1
        canvas.text((EDGE, y), line, 30 if said_first else 22, TEXT if said_first else FAINT)
        y += 38
    plan = report.plan
    facts = (
        f"{plan.width} x {plan.height}   {report.frames} frames at {plan.fps:g} fps   windows of "
        f"{report.layout.window} tokens, {report.layout.overlap}"
    )
    canvas.text((EDGE, max(148, y - 4)), facts, 17, FAINT)


def _draw_panel(
    canvas: _Canvas, meaning: Meaning, curve: Curve, report: Report, top: float
) -> None:
    right, bottom = EDGE + CURVES_WIDTH, top + PANEL
    canvas.text((EDGE, top - 10), meaning.title, 19, TEXT)
    measured = not math.isnan(curve.overall)
    colour = COLOURS[meaning.level(curve.overall)] if measured else FAINT
    canvas.text((right, top - 10), meaning.format(curve.overall), 22, colour, "rs")
    low, high = _span(meaning, curve)

    def at(frame: float, value: float) -> tuple[float, float]:
        along = frame / max(1, report.frames - 1)
        up = (min(max(value, low), high) - low) / (high - low)
        return EDGE + 12 + along * (CURVES_WIDTH - 24), bottom - 8 - up * (PANEL - 16)

    upper, lower = sorted((at(0, meaning.good)[1], at(0, meaning.poor)[1]))
    above, below = (GOOD, POOR) if meaning.good > meaning.poor else (POOR, GOOD)
    canvas.box(EDGE, top, right, upper, ZONES[above])
    canvas.box(EDGE, upper, right, lower, ZONES[FAIR])
    canvas.box(EDGE, lower, right, bottom, ZONES[below])
    for limit, level in ((meaning.good, GOOD), (meaning.poor, POOR)):
        canvas.text((right + 8, at(0, limit)[1]), f"{limit:g}", 13, COLOURS[level], "lm")
    for piece in _pieces(curve):
        points = [at(frame, value) for frame, value in piece]
        if len(points) > 1:
            canvas.line(points, LINE, 2.5)
        if len(points) < 60:
            for point in points:
                canvas.dot(point, 3, LINE)


def _pieces(curve: Curve) -> Iterator[list[tuple[int, float]]]:
    """Runs of frames with a value."""
    piece: list[tuple[int, float]] = []
    for frame, value in zip(curve.frames, curve.values, strict=True):
        if not math.isnan(value):
            piece.append((frame, value))
        elif piece:
            yield piece
            piece = []
    if piece:
        yield piece


def _span(meaning: Meaning, curve: Curve) -> tuple[float, float]:
    """The least and the most of an axis: both limits with room, and the values up to a point."""
    both = sorted((meaning.good, meaning.poor))
    room = both[1] - both[0]
    values = [value for value in curve.values if not math.isnan(value)]
    more_is_better = meaning.good > meaning.poor
    low = both[0] - room if more_is_better else 0.0
    high = both[1] + room * (2 if more_is_better else 1)
    return min([low, *(v for v in values if more_is_better)]), max([high, *values])


def _draw_time(canvas: _Canvas, report: Report) -> None:
    y = TOP + len(MEANINGS) * (PANEL + GAP) - GAP + 24
    seconds = (report.frames - 1) / report.plan.fps
    canvas.text((EDGE + 12, y), "0 s", 15, FAINT)
    canvas.text((EDGE + CURVES_WIDTH - 12, y), f"{seconds:.1f} s", 15, FAINT, "rs")
    canvas.text((EDGE + CURVES_WIDTH / 2, y), "green: good   red: poor", 15, FAINT, "ms")


# --- The worst frame --------------------------------------------------------------------------


def _draw_worst(canvas: _Canvas, report: Report, worst: WorstFrame) -> None:
    left = EDGE + CURVES_WIDTH + 64
    width = SIZE[0] - EDGE - left
    height, across = worst.picture.shape[:2]
    room = (SIZE[1] - TOP - 120) / 2
    scale = min(width / across, room / height)
    size = max(1, round(across * scale)), max(1, round(height * scale))
    picture = _as_picture(worst.picture).resize(size, Image.Resampling.LANCZOS)
    time = worst.number / report.plan.fps
    canvas.text((left, TOP - 10), f"The worst frame, {time:.1f} s (frame {worst.number})", 19, TEXT)
    canvas.paste(picture, (left, TOP))
    below = TOP + size[1] + GAP
    canvas.text((left, below - 10), "Where: windows by colour drift, borders that show", 19, TEXT)
    canvas.paste(_map(picture, report, worst), (left, below))
    _draw_legend(canvas, left, below + size[1] + 26, worst)


def _draw_legend(canvas: _Canvas, left: int, y: int, worst: WorstFrame) -> None:
    canvas.box(left, y - 7, left + 26, y - 3, SEAM)
    canvas.text((left + 36, y), f"step above {SHOWN_STEP:g} grey levels", 14, FAINT)
    if worst.drift is not None:
        largest = float(worst.drift.square().mean(-1).sqrt().max())
        text = f"tint: strays from the proxy, {largest:.1f} grey levels at most"
        canvas.text((left + 240, y), text, 14, FAINT)


def _map(picture: Image.Image, report: Report, worst: WorstFrame) -> Image.Image:
    """The frame in dark grey, its windows tinted by their drift, steps at borders in red."""
    grey = picture.convert("L").point([30 + level // 3 for level in range(256)]).convert("RGB")
    plan = report.plan
    shown = picture.width / plan.width, picture.height / plan.height
    tinted = np.array(grey, dtype=np.float32)
    rows, columns = worst.edges
    if worst.drift is not None:
        gain = 90 / MEANINGS["drift"].poor
        for i, (top, bottom) in enumerate(pairwise(rows)):
            for j, (left, right) in enumerate(pairwise(columns)):
                box = (
                    slice(round(top * shown[1]), round(bottom * shown[1])),
                    slice(round(left * shown[0]), round(right * shown[0])),
                )
                tinted[box] += np.clip(worst.drift[i, j].numpy() * gain, -90, 90)
    made = Image.fromarray(tinted.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(made)
    for x in columns[1:-1]:
        draw.line([(x * shown[0], 0), (x * shown[0], made.height)], fill=FRAME)
    for y in rows[1:-1]:
        draw.line([(0, y * shown[1]), (made.width, y * shown[1])], fill=FRAME)
    _draw_steps(draw, worst.columns, shown[0], made.height, upright=True)
    _draw_steps(draw, worst.rows, shown[1], made.width, upright=False)
    return made


def _draw_steps(
    draw: ImageDraw.ImageDraw,
    heights: dict[int, list[float]],
    scale: float,
    length: int,
    upright: bool,
) -> None:
    """Segments of borders with a step that can be seen, the wider the higher."""
    for border, steps in heights.items():
        across = border * scale
        for i, step in enumerate(steps):
            if step <= SHOWN_STEP:
                continue
            along = i * length / len(steps), (i + 1) * length / len(steps)
            ends = [(across, a) if upright else (a, across) for a in along]
            draw.line(ends, fill=SEAM, width=1 + round(min(3.0, step / SHOWN_STEP)))


def as_image(picture: Image.Image) -> Tensor:
    """A picture as a ComfyUI IMAGE [1, H, W, 3]."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]


def _as_picture(frame: Tensor) -> Image.Image:
    return Image.fromarray((frame.numpy() * 255).round().astype(np.uint8))
