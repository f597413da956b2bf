"""The comparisons of `tools/evaluate.py`: each fills the ledger, scene by scene."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import perceptual
from .judge import Judge, can_be_counted, coloured_mask
from .scenes import FPS, random_scene
from .sheets import save_sheet
from .studio import BEST, DEFAULT, FLASHVSR, METHODS, SETTINGS, UPSCALED, Case, Method, Studio

SHEETS = 4
"""Scenes of which pictures are kept."""


def window_layouts(plan: Any) -> dict[str, Any]:
    """The layout of each preset."""
    from atlasvid.engine.branch.settings import preset_window
    from atlasvid.engine.geometry.layout import Layout
    from atlasvid.engine.geometry.windows import COMPACT

    return {
        name: Layout(plan, preset_window(name, plan, COMPACT))
        for name in ("trained size", "compact")
    }


def judge_methods(
    studio: Studio, ledger: Any, options: Any, name: str, plan: Any, methods: tuple[Method, ...]
) -> None:
    """Every method on every scene of a plan."""
    chosen = [m for m in methods if not options.methods or m.name in options.methods]
    layouts, metric = window_layouts(plan), perceptual.load()
    for seed in range(options.first, options.seeds):
        missing = [m for m in chosen if (name, m.name, seed) not in ledger.rows]
        if not missing:
            continue
        case = studio.case(seed, plan)
        judge = Judge(case, layouts, metric)
        ledger.add((name, "truth", seed), judge.scores(case.truth, "trained size"))
        shown: list[Tensor] = [case.truth]
        for method in missing:
            begun = time.perf_counter()
            video = studio.make(case, method)
            seconds = time.perf_counter() - begun
            scores = judge.scores(video, method.window) | {"seconds": seconds}
            ledger.add((name, method.name, seed), scores)
            shown.append(video)
            print(f"{name} {seed} {method.name}: {_brief(scores)}", flush=True)
            if options.pictures and seed < SHEETS:
                file = f"{name}_{seed}_{re.sub(r'[^0-9a-z.]+', '_', method.name.lower())}.png"
                save_report(options.work / file, case, video, layouts[method.window])
        if seed < SHEETS:
            _save(options.work / f"{name}_{seed}.png", shown)
            titles = ["truth", *(m.name for m in missing)]
            middle = {t: v[len(v) // 2].half() for t, v in zip(titles, shown, strict=True)}
            kept = options.work / f"{name}_{seed}.pt"
            torch.save((torch.load(kept) if kept.exists() else {}) | middle, kept)


def save_report(file: Path, case: Case, video: Tensor, layout: Any) -> str:
    """Draw the quality report of a video of a case; its verdict."""
    from atlasvid.engine.quality.report import measure_video
    from atlasvid.engine.quality.report_picture import draw_report

    report = measure_video(
        video, case.plan, layout.window, overlap=layout.overlap, proxy=case.proxy_frames
    )
    draw_report(report).save(file)
    return report.verdict


def _brief(scores: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:.2f}" for key, value in scores.items())


def _save(path: Any, videos: list[Tensor]) -> None:
    save_sheet(path, torch.stack([v.permute(3, 0, 1, 2) * 2 - 1 for v in videos]), 3)


def main_comparison(studio: Studio, ledger: Any, options: Any) -> None:
    """All methods at three times the proxy's size, five frames."""
    judge_methods(studio, ledger, options, "main", studio.plan(3, 1, 2), METHODS)


def settings(studio: Studio, ledger: Any, options: Any) -> None:
    """The default with one setting changed, on the scenes and noise of the main comparison."""
    judge_methods(studio, ledger, options, "settings", studio.plan(3, 1, 2), SETTINGS)


SIZES = tuple((factor, stride) for factor in (2, 3, 4) for stride in (1, 4))


def sizes(studio: Studio, ledger: Any, options: Any) -> None:
    """The default and the trained configuration at other sizes and strides."""
    chosen = (UPSCALED, FLASHVSR, DEFAULT, BEST)
    for factor, stride in SIZES:
        plan = studio.plan(factor, stride, 2)
        judge_methods(studio, ledger, options, f"x{factor}, stride {stride}", plan, chosen)


PROXIES = {
    "model alone": (False, False),
    "scaled RoPE": (True, False),
    "scaled RoPE and proxy LoRA": (True, True),
}


def proxies(studio: Studio, ledger: Any, options: Any) -> None:
    """Sampled proxies of 17 frames at a quarter of the rate: speed, number and colour."""
    plan = studio.plan(3, 4, 5)
    for seed in range(options.first, options.seeds):
        scene = random_scene(np.random.default_rng(900_000 + seed))
        shown = []
        for name, (scaled, lora) in PROXIES.items():
            if ("proxies", name, seed) in ledger.rows:
                continue
            video = studio.decode(studio.proxy(plan, scene.prompt, seed, scaled, lora))
            scores = proxy_scores(video, scene, plan)
            ledger.add(("proxies", name, seed), scores)
            print(f"proxies {seed} {name}: {_brief(scores)}", flush=True)
            shown.append(video)
        if shown and seed < SHEETS:
            _save(options.work / f"proxies_{seed}.png", shown)


def proxy_scores(video: Tensor, scene: Any, plan: Any) -> dict[str, float]:
    """Speed in heights per second against the words' range, and balloons counted."""
    from atlasvid.engine.quality import motion, repetition

    if not can_be_counted(scene):
        return {"drift speed": math.nan, "objects": math.nan, "found": math.nan}
    found = torch.stack([coloured_mask(frame, scene) for frame in video])
    area = 0.02 * math.pi * (0.19 * plan.proxy_height) ** 2
    counts = [repetition.count_objects(mask, int(area)) for mask in found[:: len(found) // 3]]
    try:
        pixels = motion.velocity(motion.centroids(found))[0]
        speed = pixels / plan.proxy_height * FPS / plan.temporal_stride
        speed *= math.copysign(1.0, scene.velocity())
    except ValueError:
        speed = math.nan
    return {
        "drift speed": speed,
        "objects": sum(counts) / len(counts),
        "found": float(min(counts) > 0),
    }


COMPARISONS: dict[str, Callable[[Studio, Any, Any], None]] = {
    "main": main_comparison,
    "settings": settings,
    "sizes": sizes,
    "proxies": proxies,
}
