"""Writes `benchmarks/quality.md` with its plot and contact sheet from an evaluation's scores."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from measure import RESULTS, markdown_table

Rows = Mapping[tuple[str, str, int], Mapping[str, float]]

MEASURES = {
    "fidelity": ("fidelity to the proxy", "dB", "{:.1f}"),
    "truth": ("to the truth", "dB", "{:.1f}"),
    "detail": ("fine detail against the truth's", "dB", "{:+.1f}"),
    "seam": ("offset between windows", "grey levels", "{:.1f}"),
    "seam ratio": ("steps at window borders against elsewhere", "ratio", "{:.2f}"),
    "drift": ("colour drift of windows", "grey levels", "{:.1f}"),
    "warping": ("along the true flow, beyond the truth", "grey levels", "{:.1f}"),
    "flicker": ("flicker, beyond the truth", "grey levels", "{:.1f}"),
    "obeyed": ("colour as asked", "share", "{:.2f}"),
    "objects": ("balloons", "count", "{:.2f}"),
    "speed": ("speed against the truth's", "ratio", "{:.2f}"),
    "drift speed": ("speed along the word", "heights per second", "{:.2f}"),
    "stlpips": ("perceptual distance to the truth", "ST-LPIPS", "{:.3f}"),
}
TITLES = {
    "main": "Three times the proxy's size, five frames",
    "settings": "One setting of the default changed",
    "proxies": "Sampled proxies: speed (0.09 to 0.13 heights per second are right) and number",
}


def complete(rows: Rows) -> Rows:
    """Only the scenes of a comparison that every one of its methods has made."""
    kept: dict[tuple[str, str, int], Mapping[str, float]] = {}
    for name in dict.fromkeys(name for name, _, _ in rows):
        methods = methods_of(rows, name)
        for (kind, method, seed), scores in rows.items():
            if kind == name and all((name, each, seed) in rows for each in methods):
                kept[kind, method, seed] = scores
    return kept


def write(rows: Rows) -> None:
    """The report of all comparisons that the rows hold."""
    names = sorted({name for name, _, _ in rows}, key=lambda name: (name == "proxies", name))
    parts = [_head()]
    with (RESULTS / "quality.jsonl").open("w", encoding="utf-8") as out:
        for (name, method, seed), scores in rows.items():
            row = {"set": name, "method": method, "seed": seed, "scores": scores}
            out.write(json.dumps(row) + "\n")
    for name in names:
        parts.append(f"## {TITLES.get(name, name)}\n\n{table(rows, name)}")
    if "main" in names:
        parts.append("![Fidelity, detail, borders and colour of every method](quality.png)")
        plot(rows)
    if (RESULTS / "quality_sheet.jpg").exists():
        parts.append("![The middle frame of every method](quality_sheet.jpg)")
    (RESULTS / "quality.md").write_text("\n\n".join(parts) + "\n", "utf-8")


def _head() -> str:
    return (
        "# Quality, on a world whose truth is known\n\n"
        "Made by `python tools/evaluate.py` with the tiny world's models (8 million parameters, "
        "trained on drawings): they show the method and what its parts do, not Wan's quality. "
        f"{date.today()}. Means over the same scenes and noise for every method, with 95 % "
        "confidence intervals (Student's t); eight Euler steps and cfg 3 unless the row says "
        "otherwise. "
        "A row holds the scenes of "
        "which every method was made; balloons and speed are counted where their colour is nowhere "
        "else in the picture."
    )


def methods_of(rows: Rows, name: str) -> list[str]:
    return list(dict.fromkeys(method for kind, method, _ in rows if kind == name))


def values(rows: Rows, name: str, method: str, measure: str) -> list[float]:
    """Scores by seed, those that do not apply left out."""
    found = (
        scores.get(measure, math.nan)
        for (kind, other, _), scores in sorted(rows.items(), key=lambda item: item[0][2])
        if kind == name and other == method
    )
    return [value for value in found if math.isfinite(value)]


def estimate(given: Iterable[float]) -> tuple[float, float]:
    """Mean and half the width of its interval; NaN for none or one value."""
    from atlasvid.engine.quality.statistics import mean_interval

    given = list(given)
    if len(given) < 2:
        return (given[0] if given else math.nan), math.nan
    mean, _, high = mean_interval(given)
    return mean, high - mean


def table(rows: Rows, name: str) -> str:
    """One comparison: a row per method, a column per measure that it has."""
    methods = methods_of(rows, name)
    measured = [m for m in MEASURES if any(values(rows, name, method, m) for method in methods)]
    header = ["method", "scenes", *(f"{MEASURES[m][0]} ({MEASURES[m][1]})" for m in measured)]
    lines = []
    for method in methods:
        scenes = len({seed for kind, other, seed in rows if (kind, other) == (name, method)})
        cells = [method, str(scenes)]
        for m in measured:
            mean, half = estimate(values(rows, name, method, m))
            form = MEASURES[m][2]
            spread = f" ± {form.replace('+', '').format(half)}" if math.isfinite(half) else ""
            cells.append(form.format(mean) + spread if math.isfinite(mean) else "-")
        lines.append(cells)
    return markdown_table(header, lines)


SHOWN = ("fidelity", "detail", "seam ratio", "drift")
NOT_SAMPLED = ("truth", "proxy up-scaled")


def plot(rows: Rows) -> None:
    """Four measures side by side, a row per sampled method, with intervals."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    methods = [m for m in methods_of(rows, "main") if m not in NOT_SAMPLED][::-1]
    size = (13, 0.42 * len(methods) + 1)
    figure, panels = plt.subplots(1, len(SHOWN), figsize=size, sharey=True)
    for axes, measure in zip(panels, SHOWN, strict=True):
        for y, method in enumerate(methods):
            mean, half = estimate(values(rows, "main", method, measure))
            axes.errorbar(mean, y, xerr=half, fmt="o", capsize=3, color="#a1309b")
        name, unit, _ = MEASURES[measure]
        axes.set_title(textwrap.fill(f"{name} ({unit})", 28), fontsize=9)
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(methods)), methods, fontsize=9)
    figure.tight_layout()
    figure.savefig(RESULTS / "quality.png", dpi=100)
    plt.close(figure)


ON_SHEET = (
    "truth",
    "proxy up-scaled",
    "stock model at full size",
    "windows alone",
    "guide, 16 x ratio",
    "0.7 and structure, 16 x ratio (the default)",
    "guide LoRA, 0.7 and structure, close-up prompt, cfg 1",
    "FlashVSR",
)


def save_contact_sheet(files: list[Path]) -> None:
    """The middle frame of some methods (columns) on scenes (rows, a file each)."""
    if not files:
        return
    import matplotlib as mpl
    import torch

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    scenes: list[dict[str, Any]] = [torch.load(file) for file in files]
    shown = [m for m in ON_SHEET if all(m in scene for scene in scenes)]
    columns = min(4, len(shown))
    across = math.ceil(len(shown) / columns)
    size = (columns * 3.2, across * len(scenes) * 2.35)
    figure, axes = plt.subplots(across * len(scenes), columns, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, method in enumerate(shown):
        for j, scene in enumerate(scenes):
            axis = axes[(i // columns) * len(scenes) + j][i % columns]
            axis.imshow(scene[method].float().clamp(0, 1).numpy())
            if j == 0:
                axis.set_title(method, fontsize=7.5)
    figure.tight_layout(pad=0.3)
    figure.savefig(RESULTS / "quality_sheet.jpg", dpi=90, pil_kwargs={"quality": 88})
    plt.close(figure)
