"""Scores a video of the tiny world against its truth, by the measures of `engine/quality`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import perceptual
from .scenes import BALLOONS, FPS, LIGHTS, Scene, flow, masks
from .studio import Case

TOLD_APART = ("red", "purple", "green", "yellow")
"""Balloons whose colour is in no sky and no land, so that they can be counted by it."""


def hue_vectors(frames: Tensor) -> Tensor:
    """Colour without brightness [..., 2]: opponent axes over the sum of channels."""
    r, g, b = frames.unbind(-1)
    total = (r + g + b).clamp(min=0.06)
    return torch.stack([(r - g) / total, (0.5 * (r + g) - b) / total], dim=-1)


def balloon_vectors(scene: Scene) -> dict[str, Tensor]:
    """Hue vectors of every colour of balloon in the light of a scene."""
    light = LIGHTS[scene.light].balloon
    return {name: hue_vectors(light * torch.tensor(rgb)) for name, rgb in BALLOONS.items()}


def colour_seen(frames: Tensor, seen: Tensor, scene: Scene) -> str:
    """The colour of balloon that the masked pixels are nearest to."""
    mean = hue_vectors(frames)[seen].median(0).values
    named = balloon_vectors(scene)
    return min(named, key=lambda name: float((named[name] - mean).norm()))


def coloured_mask(frame: Tensor, scene: Scene) -> Tensor:
    """Where a frame [H, W, 3] has the balloon's colour: [H, W]."""
    wanted = balloon_vectors(scene)[scene.balloon]
    vectors = hue_vectors(frame)
    along = (vectors @ wanted) / (vectors.norm(dim=-1) * wanted.norm() + 1e-6)
    return (along > 0.93) & (vectors.norm(dim=-1) > 0.45 * wanted.norm())


class Judge:
    """The measures, with what belongs to the truth kept for all methods of a case."""

    def __init__(self, case: Case, layouts: dict[str, Any], metric: Any = None):
        """
        Args:
            layouts: the engine's layout of each preset, by its name.
            metric: what `perceptual.load` gives; without it, no perceptual distance.
        """
        self.case = case
        self.metric = metric
        from atlasvid.engine.quality.lines import layout_lines

        self.windows = {name: layout_lines(layout) for name, layout in layouts.items()}
        pairs = list(zip(case.times[:-1], case.times[1:], strict=True))
        self.flows = [flow(case.scene, case.view, a, b) for a, b in pairs]
        self.still = [self._followed(a, b) for a, b in pairs]
        self.seen = masks(case.scene, case.view, case.times)[0]
        self.truth_warp = self._warping(case.truth)
        self.truth_flicker = self._flicker(case.truth)

    def _followed(self, start: float, stop: float) -> Tensor:
        """Pixels whose surface is seen in both frames and whose flow is sure: not the sky, where
        clouds pass before it, and not the edges of the balloon."""
        now, sky = (m[0] for m in masks(self.case.scene, self.case.view, [start]))
        after = masks(self.case.scene, self.case.view, [stop])[0][0]
        edge = _grown(now | after, 4) & ~_shrunk(now & after, 4)
        return ~sky & ~edge

    def _warping(self, video: Tensor) -> Tensor:
        from atlasvid.engine.quality.flow import warping_errors

        return warping_errors(video, self.flows, self.still)

    def _flicker(self, video: Tensor) -> Tensor:
        from atlasvid.engine.quality.flow import flicker_energies

        return flicker_energies(video, self.flows, self.still)

    def scores(self, video: Tensor, window: str) -> dict[str, float]:
        """Every measure of a video [T, H, W, 3]; NaN where one does not apply.

        Args:
            window: name of the windows that it was made with, whose borders are looked at.
        """
        from atlasvid.engine.quality import bands, colour, flow, seams

        case, size = self.case, self.case.proxy_frames.shape[1:3]
        stride = case.plan.temporal_stride
        truth_high = bands.rms(bands.high_band_energies(case.truth, size))
        lines = self.windows[window].all_blocks
        given = {
            "fidelity": bands.psnr(bands.proxy_errors(video, case.proxy_frames, stride)),
            "truth": bands.psnr((video - case.truth).square().flatten(1).mean(1)),
            "detail": bands.decibels(bands.rms(bands.high_band_energies(video, size)), truth_high),
            "warping": flow.rms_beyond(self._warping(video), self.truth_warp),
            "flicker": flow.rms_beyond(self._flicker(video), self.truth_flicker),
            "drift": colour.rms_drift(
                colour.window_drift(video, case.proxy_frames, stride, self.windows[window].block)
            ),
            "obeyed": float(
                colour_seen(video[len(video) // 2], self.seen[len(video) // 2], case.scene)
                == case.scene.balloon
            ),
        }
        if self.metric is not None:
            given["stlpips"] = perceptual.distance(self.metric, video, case.truth)
        off = video - case.truth  # the picture's own edges do not count
        found = seams.row_seams(off, lines.rows), seams.column_seams(off, lines.columns)
        given["seam"] = sum(score.excess for score in found) / 2
        given["seam ratio"] = sum(score.ratio for score in found) / 2
        return given | self._objects(video)

    def _objects(self, video: Tensor) -> dict[str, float]:
        """Balloons counted, and how fast the colour moves against the truth's speed."""
        from atlasvid.engine.quality import motion, repetition

        scene, view = self.case.scene, self.case.view
        if not can_be_counted(scene):
            return {"objects": math.nan, "speed": math.nan}
        found = torch.stack([coloured_mask(frame, scene) for frame in video])
        minimal = int(0.02 * (math.pi * (scene.radius / view.pixel) ** 2)) + 1
        counts = [
            repetition.count_objects(mask, minimal) for mask in found[:: max(1, len(found) // 3)]
        ]
        wanted = scene.velocity() / view.pixel / FPS
        try:
            moved = motion.velocity(motion.centroids(found))[0] / wanted
        except ValueError:
            moved = math.nan
        return {"objects": sum(counts) / len(counts), "speed": moved}


def can_be_counted(scene: Scene) -> bool:
    """Whether the balloon's colour is nowhere else in its picture."""
    if scene.balloon not in TOLD_APART:
        return False
    clashes = {"green": ("hills",), "yellow": ("desert", "hills"), "red": ("desert",)}
    return scene.land not in clashes.get(scene.balloon, ()) and scene.light != "dusk"


def _grown(mask: Tensor, pixels: int) -> Tensor:
    side = 2 * pixels + 1
    grown = torch.nn.functional.max_pool2d(mask[None, None].float(), side, 1, pixels)
    return grown[0, 0] > 0.5


def _shrunk(mask: Tensor, pixels: int) -> Tensor:
    return ~_grown(~mask, pixels)
